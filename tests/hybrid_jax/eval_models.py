"""Small models for the tests of evaluation, of a linear layer and one of attention, lively enough not to repeat one token."""

from hybrid_jax import Model, config
from tests.hybrid_jax.random_models import random_model


def small_model(mixer: config.Mixer, tokenizer=None, **changes) -> Model:
    fields = dict(layers=2, ratio=2, attention=config.Attention(heads=2), width=32, mlp_width=48, vocabulary=258)
    model = random_model(config.ModelConfig(mixer=mixer, dtype="float32", remat="none", **(fields | changes)), std=0.3)
    model.tokenizer = tokenizer
    return model
