"""Mixers called by themselves, outside of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import config, mixers
from hybrid_jax.layers.rotary import positions
from hybrid_jax.mixers import Context, Memory
from tests.helpers import relative_error
from tests.hybrid_jax import reference_model
from tests.hybrid_jax.test_model import FAMILIES

pytestmark = pytest.mark.usefixtures("one_device")
MODEL = config.ModelConfig(width=32, ratio=None, dtype="float32", mixer=config.GLA(heads=2))


@pytest.mark.parametrize("family", ["retnet", "gated_delta_net", "attention"])
def test_a_mixer_takes_x_alone_for_whole_documents(family):
    mixer = mixers.build((FAMILIES | {"attention": config.Attention(heads=2)})[family], MODEL, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 12, 32))
    for segment_ids in (None, jnp.asarray(np.repeat([[1, 2], [3, 0]], 6, axis=1))):
        told = Context(segment_ids, positions(2, 12, segment_ids)), Memory()
        alone = () if segment_ids is None else (Context(segment_ids),)
        (found, memory), expected = jax.jit(lambda mixer, x, *pair: (mixer(x, *pair[0]), mixer(x, *pair[1])))(mixer, x, alone, told)
        assert found.shape == x.shape and jax.tree.all(jax.tree.map(jnp.array_equal, (found, memory), expected))


EPS = {"attention": config.Attention(heads=2, qk_norm=True)} | {name: FAMILIES[name] for name in ("hgrn2", "gla", "gated_delta_net")}


@pytest.mark.parametrize("family", EPS)
def test_norms_add_their_own_eps(family):
    """The model's, or 1e-5 of queries and keys and of HGRN2, 1e-6 where lengths are made one: of inputs so small that each tells."""
    model = config.ModelConfig(width=32, ratio=None, dtype="float32", mixer=EPS[family], norm_eps=1e-3)
    mixer = mixers.build(EPS[family], model, nnx.Rngs(0))
    x = 0.05 * jax.random.normal(jax.random.key(1), (1, 12, 32))
    found = jax.jit(lambda mixer, x: mixer(x)[0])(mixer, x)[0]
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(mixer)))
    expected = reference_model.MIXERS[family](EPS[family], model, params, np.asarray(x[0], np.float64), np.zeros(1))
    assert relative_error(found, expected) < 2e-5
