"""The blockwise cross-entropy against a plain log-softmax in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_jax.config import MeshConfig
from hybrid_jax.loss import cross_entropy
from hybrid_jax.sharding import batch_sharding, make_mesh
from tests.helpers import relative_error


def problem(seed, B, T, D, V, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    kernel = jnp.asarray(scale * rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) > 0.3), jnp.float32)
    return hidden, kernel, targets, weights


def reference(hidden, kernel, targets, weights):
    """(losses [B,T], correct [B,T], d_hidden, d_kernel) in float64, the whole logits at once."""
    h, w, g = (np.asarray(x, np.float64) for x in (hidden, kernel, weights))
    logits = h @ w
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    onehot = np.eye(w.shape[1])[np.asarray(targets)]
    d_logits = (np.exp(log_probabilities) - onehot) * g[..., None]
    d_hidden = d_logits @ w.T
    d_kernel = np.einsum("btd,btv->dv", h, d_logits)
    return -(log_probabilities * onehot).sum(-1), logits.argmax(-1) == np.asarray(targets), d_hidden, d_kernel


def total_and_gradients(block):
    def total(*args):
        losses = cross_entropy(*args, block=block)
        return 3.0 * losses.total, losses  # a cotangent other than one

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 3), has_aux=True))


def check(out, args, tolerance):
    (total, losses), (d_hidden, d_kernel, d_weights) = out
    expected, correct, expected_d_hidden, expected_d_kernel = reference(*args)
    weights = np.asarray(args[3], np.float64)
    assert relative_error(total, 3 * (weights * expected).sum()) < tolerance
    assert relative_error(losses.total_by_position, (weights * expected).sum(0)) < tolerance
    assert relative_error(losses.weight_by_position, weights.sum(0)) < 1e-6
    assert relative_error(losses.weight, weights.sum()) < 1e-6
    assert relative_error(losses.correct, (weights * correct).sum()) < 1e-6
    assert relative_error(d_hidden, 3 * expected_d_hidden) < tolerance
    assert relative_error(d_kernel, 3 * expected_d_kernel) < tolerance
    assert relative_error(d_weights, 3 * expected) < tolerance


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 3), T=st.integers(1, 20), D=st.integers(1, 9), V=st.integers(2, 40), block=st.integers(1, 24), seed=st.integers(0, 99)
)
def test_value_and_gradients_are_those_of_log_softmax(B, T, D, V, block, seed):
    args = problem(seed, B, T, D, V)
    check(total_and_gradients(block)(*args), args, 2e-6)  # float32 sums of at most 60 tokens


def test_large_logits_stay_finite_and_exact():
    args = problem(0, 2, 11, 16, 50, scale=100.0)  # logits of several hundred: exp would overflow float32
    check(total_and_gradients(4)(*args), args, 1e-5)


def test_bfloat16_hidden_states_lose_only_their_own_rounding():
    args = problem(1, 2, 33, 64, 100, scale=0.1, dtype=jnp.bfloat16)
    rounded = (args[0], args[1].astype(jnp.bfloat16), *args[2:])
    (total, _), (d_hidden, d_kernel, _) = total_and_gradients(8)(*args)
    expected, _, expected_d_hidden, expected_d_kernel = reference(*rounded)
    assert d_hidden.dtype == jnp.bfloat16 and d_kernel.dtype == jnp.float32
    assert relative_error(total, 3 * (np.asarray(args[3], np.float64) * expected).sum()) < 1e-6  # accumulated in float32
    assert relative_error(d_hidden, 3 * expected_d_hidden) < 2**-8  # d_logits and the result are each rounded to 8 bits
    assert relative_error(d_kernel, 3 * expected_d_kernel) < 2**-8


@pytest.mark.parametrize("block", [8, 64])
def test_a_tied_kernel_gets_its_gradient_in_bfloat16(block):
    hidden, kernel, targets, weights = problem(6, 2, 33, 64, 100, scale=0.1, dtype=jnp.bfloat16)

    def gradient(table):
        return jax.grad(lambda table: cross_entropy(hidden, table.T, targets, weights, block=block).total)(table)

    rounded = kernel.astype(jnp.bfloat16)
    _, _, _, expected = reference(hidden, rounded, targets, weights)
    assert relative_error(jax.jit(gradient)(kernel.T), expected.T) < 2**-8


def test_equal_logits_are_not_counted_as_correct():
    hidden, _, targets, weights = problem(2, 1, 6, 4, 8)
    losses = cross_entropy(hidden, jnp.zeros((4, 8)), targets, weights)
    assert losses.correct == 0
    assert relative_error(losses.total, np.log(8) * weights.sum()) < 1e-6


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=2, seq=2, tensor=2), dict(fsdp=8)])
@pytest.mark.parametrize("V", [24, 25])  # 25 does not divide over `tensor`: every device then works on the whole vocabulary
def test_every_mesh_gives_the_same(sizes, V):
    args = problem(3, 8, 10, 8, V)
    mesh = make_mesh(MeshConfig(**sizes))
    rows = batch_sharding(mesh)
    hidden, kernel, targets, weights = args
    placed = (
        jax.device_put(hidden, rows),
        jax.device_put(kernel, NamedSharding(mesh, P("fsdp", "tensor" if V == 24 else None))),
        jax.device_put(targets, rows),
        jax.device_put(weights, rows),
    )
    with jax.set_mesh(mesh):
        check(total_and_gradients(2)(*placed), args, 2e-6)


def test_the_kernel_gradient_is_summed_over_devices_once_not_at_every_block():
    args = problem(4, 8, 16, 8, 24)
    mesh = make_mesh(MeshConfig(data=8, fsdp=1))
    placed = [jax.device_put(x, NamedSharding(mesh, P())) for x in args]
    with jax.set_mesh(mesh):
        text = total_and_gradients(2).lower(*placed).compile().as_text()
    loops = re.findall(r"body=%([\w.-]+)", text)
    bodies = [computation for computation in text.split("\n\n") if computation.split(" ", 1)[0].lstrip("%") in loops]
    assert len(bodies) == 1 and "all-reduce" in text
    assert "all-reduce" not in bodies[0]


def test_no_buffer_of_all_logits():
    B, T, D, V = 2, 512, 16, 4000
    args = problem(5, B, T, D, V)
    all_logits = 4 * B * T * V
    whole, blocks = (total_and_gradients(block).lower(*args).compile().memory_analysis().temp_size_in_bytes for block in (T, 32))
    assert whole > all_logits  # what the measure shows when they are there
    assert blocks < all_logits / 4
