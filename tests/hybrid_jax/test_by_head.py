"""What is computed a head at a time, as TPUs are given it: the same as over [B,T,H,K], and only where heads are whole tiles on a device."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hybrid_jax.config import MeshConfig
from hybrid_jax.layers import RMSNorm, l2_normalize
from hybrid_jax.layers.rotary import positions, rotate
from hybrid_jax.mixers.delta_net import sum_normalize
from hybrid_jax.mixers.projections import by_head
from hybrid_jax.sharding import make_mesh
from pallas_kernels import platforms
from tests.helpers import tree_errors

B, T = 2, 5


def norm(width, **options):
    module = RMSNorm(width, 1e-6, **options)
    if module.scale is not None:
        module.scale[...] = jax.random.normal(jax.random.key(7), (width,))
    return module


FUNCTIONS = {
    "l2_normalize": (lambda K: l2_normalize, 1),
    "sum_normalize": (lambda K: sum_normalize, 1),
    "rotate": (lambda K: lambda x: rotate(x, positions(B, T, None) + 3, 1e4), 1),
    "norm": (norm, 1),
    "gated norm": (norm, 2),
    "gated norm, sigmoid, no scale": (partial(norm, scale=False, activation="sigmoid"), 2),
}


def random_heads(count, H, K, dtype=jnp.float32):
    return [jax.random.normal(key, (B, T, H, K), dtype) for key in jax.random.split(jax.random.key(1), count)]


@pytest.mark.parametrize("H, K", [(1, 128), (4, 256)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_head_after_the_other_is_all_at_once(monkeypatch, name, H, K):
    make, count = FUNCTIONS[name]
    graph, params = nnx.split(module) if isinstance(module := make(K), RMSNorm) else (None, {})
    seen = []

    def function(params, *arrays):
        seen.append(arrays[0].shape)
        return (nnx.merge(graph, params) if graph else module)(*arrays)

    def outputs(params, arrays):
        y = by_head(partial(function, params), *arrays)
        return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y), y

    run = jax.grad(outputs, argnums=(0, 1), has_aux=True)
    expected = run(params, random_heads(count, H, K))
    assert seen == [(B, T, H, K)]
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    found = run(params, random_heads(count, H, K))
    assert seen[1:] == [(B, T, K)] * H
    assert max(tree_errors(found, expected).values()) < 1e-6


def test_a_missing_gate_is_missing_for_each_head(monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    (x,) = random_heads(1, 2, 128, jnp.bfloat16)
    y = by_head(RMSNorm(128, 1e-6), x, None)
    assert y.dtype == jnp.bfloat16 and (y == RMSNorm(128, 1e-6)(x)).all()


@pytest.mark.parametrize("H, K, mesh", [(2, 64, MeshConfig()), (2, 128, MeshConfig(fsdp=4, tensor=2))])
def test_heads_in_parts_stay_together(monkeypatch, H, K, mesh):
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    shapes = []
    with jax.set_mesh(make_mesh(mesh)):
        by_head(lambda x: shapes.append(x.shape) or x, *random_heads(1, H, K))
    assert shapes == [(B, T, H, K)]
