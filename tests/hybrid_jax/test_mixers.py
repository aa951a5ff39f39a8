"""Mixers called by themselves, outside of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import config, mixers
from hybrid_jax.layers.rotary import positions
from hybrid_jax.mixers import Context, Memory
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
