"""The Hopper kernels of the gated delta rule, interpreted: against the reference in float64, and its contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pallas_kernels import platforms
from pallas_kernels.gated_delta_rule import gated_delta_rule, gpu, gpu_pieces
from tests.helpers import tree_errors
from tests.pallas_kernels import hopper
from tests.pallas_kernels.test_gated_delta_rule import Case, documents_of, evaluate, example

pytestmark = pytest.mark.gpu


def errors(case, implementation="pallas", seed=1):
    """Of outputs and all gradients against the reference in float64, on values rounded to bfloat16."""
    segment_ids = documents_of(case)
    arguments = example(seed, case, segment_ids)
    for name in "qkv":
        arguments[name] = np.asarray(jnp.asarray(arguments[name], jnp.bfloat16), np.float64)
    expected = evaluate(case, arguments, segment_ids, "reference", np.float64)
    with hopper.kernels():
        found = evaluate(case, arguments, segment_ids, implementation, jnp.bfloat16)
    if segment_ids is not None:
        padding = np.asarray(segment_ids) == 0
        assert all(not np.any(x[padding]) for x in found.values() if x.shape[:2] == padding.shape)
    return tree_errors(found, expected)


def slow(*case, **sizes):
    return pytest.param(Case(*case, **sizes), marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "case",
    [
        Case(130, "head", documents=True, B=1, H=1, HV=2, K=64, V=64),
        Case(64, "none", B=1, H=1, HV=1, K=128, V=128),
        Case(100, "channel", documents=True, B=1, H=1, HV=1, K=64, V=64),
        slow(64, "channel", "medium", B=1, H=1, HV=1, K=128, V=64),
        slow(1, "fixed", B=2, H=1, HV=2, K=64, V=64),
        slow(200, "none", documents=True, B=2, H=2, HV=2, K=64, V=64),
        slow(150, "head", "strong", documents=True, B=1, H=1, HV=1, K=64, V=64),
        slow(150, "head", "weak", B=1, H=1, HV=1, K=256, V=256),
        slow(150, "head", "zero", documents=True, B=1, H=1, HV=1, K=64, V=192, keys="long"),
        slow(1, "channel", B=2, H=1, HV=1, K=64, V=64),
        slow(150, "channel", "strong", documents=True, B=1, H=1, HV=1, K=64, V=64),
        slow(130, "channel", "zero", B=1, H=1, HV=2, K=64, V=64, keys="long"),
        slow(150, "channel", "weak", B=1, H=1, HV=1, K=128, V=128),
        slow(200, "channel", documents=True, B=2, H=2, HV=2, K=128, V=192),
    ],
    ids=lambda case: "-".join(str(x) for x in case),
)
def test_matches_the_reference(case):
    found = errors(case)
    # Operands of products are rounded to 2^-9 three or four times in a row, as on TPU.
    assert max(found.values()) < 8e-3, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(250, "head", "weak", B=1, H=1, HV=1, K=64, V=64),
        Case(300, "head", documents=True, B=1, H=1, HV=1, K=256, V=64),
        Case(250, "channel", "weak", B=1, H=1, HV=1, K=128, V=64),
    ],
)
def test_in_pieces(monkeypatch, case):
    monkeypatch.setattr(gpu, "LEAST", 1)
    found = errors(case)
    assert max(found.values()) < 1e-2, found


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(200, axes, "zero", B=1, H=1, HV=1, K=64, V=64, keys="same") for axes in ("none", "channel")])
def test_one_key_over_and_over(case):
    """The worst that can happen to the inverse, with beta up to 2; what the gradients of v and beta leave after it cancels is small."""
    found = errors(case)
    assert found["['output']"] < 8e-3 and found["['final_state']"] < 8e-3, found
    assert max(found.values()) < 0.08, found


@given(walks=st.integers(1, 600), chunks=st.integers(1, 1024))
def test_pieces_hold_every_chunk_and_fill_the_multiprocessors(walks, chunks):
    plan = gpu.Plan.of(1.0, 1, False, walks, chunks, even=True)
    assert (plan.pieces - 1) * plan.chunks < chunks <= plan.pieces * plan.chunks
    assert plan.pieces == 1 or plan.chunks >= gpu.LEAST and walks * plan.pieces <= gpu.WARPGROUPS
    assert (plan.warpgroups == 2) == (walks * plan.pieces > gpu.WARPGROUPS // 2)


def test_the_second_half_of_transitions_is_not_for_xla_to_leave_out():
    """On a GPU it takes a cast to bfloat16 and back for none, and what that took off for 0; not so a rounding that is asked for."""
    module = hopper.lowered(gpu_pieces.halves_by_xla, jax.ShapeDtypeStruct((64, 64), jnp.float32))
    assert "stablehlo.reduce_precision" in module and "(tensor<64x64xbf16>) -> tensor<64x64xf32>" not in module


def arguments_of(axes, K=128, V=128, dtype=jnp.bfloat16):
    arguments = example(0, Case(140, axes, B=1, H=1, HV=1, K=K, V=V))
    return {name: jnp.asarray(x, dtype if name in "qkv" else jnp.float32) for name, x in arguments.items()}


@pytest.mark.parametrize("axes", ["none", *(pytest.param(axes, marks=pytest.mark.slow) for axes in ("head", "channel"))])
def test_chosen_where_it_is_lowered_for_hopper(axes):
    def loss(arguments):
        output, state = gated_delta_rule(**arguments)
        return jnp.sum(output.astype(jnp.float32)) + jnp.sum(state)

    assert "mosaic_gpu" in hopper.lowered(jax.grad(loss), arguments_of(axes))


@pytest.mark.parametrize("arguments", [arguments_of("head", K=256), arguments_of("channel")], ids=["head", "channel"])
def test_lowered_inside_of_shard_map_and_checkpoint(arguments):
    def loss(arguments):
        output, state = jax.checkpoint(lambda arguments: gated_delta_rule(**arguments))(arguments)
        return jnp.sum(output.astype(jnp.float32)) + jnp.sum(state)

    mapped = jax.shard_map(jax.grad(loss), in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    assert "mosaic_gpu" in hopper.lowered(mapped, arguments)


@pytest.mark.parametrize(
    "arguments, needs",
    [
        (arguments_of("channel", K=256), "keys of 64, 128 channels with a log_decay a channel, not 256"),
        (arguments_of("none", K=96), "keys of 64, 128, 256 channels, not 96"),
        (arguments_of("none", V=32), "values of a multiple of 64 channels, not 32"),
        (arguments_of("none", dtype=jnp.float32), "q in bfloat16, not float32"),
    ],
    ids=["channel", "keys", "values", "dtype"],
)
def test_what_the_kernels_do_not_take_is_refused_by_name_and_not_chosen(monkeypatch, arguments, needs):
    monkeypatch.setattr(platforms, "generation", lambda: "hopper")
    with pytest.raises(ValueError, match=needs):
        gated_delta_rule(**arguments, implementation="pallas")
    assert not gpu.is_faster(*(arguments.get(name) for name in ("q", "k", "v", "beta", "log_decay")))


@pytest.mark.parametrize("axes", ["head", "channel"])
def test_with_types_of_64_bits_it_is_xlas(axes):
    with jax.enable_x64(True):
        text = hopper.lowered(lambda arguments: gated_delta_rule(**arguments)[0], arguments_of(axes))
        assert "mosaic_gpu" not in text
