"""More rows or chunks than a launch on a GPU takes along its second and third axis: kernels then have one axis, and are the same."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.linear_scan import linear_scan
from tests.pallas_kernels import test_causal_conv_gpu, test_gated_delta_rule_gpu, test_gated_linear_attention_gpu, test_linear_scan_gpu

ROWS, TOKENS = 70_000, 65_537 * 64


def of_rows(*shape):
    return jax.ShapeDtypeStruct((ROWS, 16, *shape), jnp.bfloat16)


def of_tokens(*shape):
    return jax.ShapeDtypeStruct((1, TOKENS, *shape), jnp.bfloat16)


def decayed_delta_rule(q, k, v, beta, log_decay, **options):
    return gated_delta_rule(q, k, v, beta, log_decay=log_decay, **options)


GATED = of_tokens(1, 64), of_tokens(1, 64), of_tokens(1, 64)
LARGE = {
    "linear_scan": (linear_scan, of_rows(128), of_rows(128)),
    "causal_conv": (causal_conv, of_rows(128), jax.ShapeDtypeStruct((128, 4), jnp.bfloat16)),
    "gated_linear_attention by head": (gated_linear_attention, *GATED, of_tokens(1)),
    "gated_linear_attention by channel": (gated_linear_attention, *GATED, of_tokens(1, 64)),
    "gated_delta_rule by head": (decayed_delta_rule, *GATED, of_tokens(1), of_tokens(1)),
    "gated_delta_rule by channel": (decayed_delta_rule, *GATED, of_tokens(1), of_tokens(1, 64)),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_axis_is_longer_than_a_launch_takes(name):
    grids, kernel = [], plgpu.kernel

    def noted(*arguments, grid, **keywords):
        grids.append(grid)
        return kernel(*arguments, grid=grid, **keywords)

    operator, *shapes = LARGE[name]

    def loss(*arguments):
        return sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(operator(*arguments, implementation="pallas")))

    with mock.patch.object(platforms, "generation", lambda: "hopper"), mock.patch.object(plgpu, "kernel", noted):
        jax.eval_shape(jax.grad(loss, argnums=tuple(range(len(shapes)))), *shapes)
    assert len(grids) > 1 and all(max(np.prod(grid[:-2]), *grid[-2:-1], 0) <= 65535 and grid[-1] < 2**31 for grid in grids), grids


@pytest.fixture
def in_one_axis(monkeypatch):
    monkeypatch.setattr(platforms, "LARGEST_AXIS", 0)


@pytest.mark.slow
def test_linear_scan_is_the_same(in_one_axis, small_chunks):
    test_linear_scan_gpu.test_pieces_chunks_and_documents(None, jnp.float32)


small_chunks = test_linear_scan_gpu.small_chunks


@pytest.mark.slow
def test_causal_conv_is_the_same(in_one_axis):
    ids = np.repeat([[1, 2, 0], [3, 3, 1]], [30, 50, 20], axis=1)
    test_causal_conv_gpu.check(test_causal_conv_gpu.example(0, 2, 100, 256, 4, jnp.float32), ids)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["head", "channel"])
def test_gated_linear_attention_is_the_same(in_one_axis, axes):
    case = test_gated_linear_attention_gpu.Case(200, axes, documents=True, B=2, H=1, HV=2, K=128, V=64)
    test_gated_linear_attention_gpu._matches_the_reference(case)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["head", "channel"])
def test_gated_delta_rule_is_the_same(in_one_axis, axes):
    case = test_gated_delta_rule_gpu.Case(200, axes, documents=True, B=2, H=1, HV=2, K=128, V=64)
    found = test_gated_delta_rule_gpu.errors(case)
    assert max(found.values()) < 1e-2, found  # as in test_in_pieces
