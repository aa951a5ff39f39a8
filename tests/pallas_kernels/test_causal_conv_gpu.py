"""The Hopper kernels of the short convolution, in the interpreter that looks for races, and lowered for a card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platforms
from pallas_kernels.causal_conv import causal_conv, gpu
from tests.helpers import random_segment_ids, tree_errors
from tests.pallas_kernels import hopper
from tests.pallas_kernels.test_causal_conv import ROWS, example, value_and_gradients

pytestmark = pytest.mark.gpu

BOUND = {jnp.float32: 1e-6, jnp.bfloat16: 2**-8}  # bfloat16: outputs and gradients are rounded, by 2^-9 at most


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 tokens, two a block."""
    for name, tokens in {"FORWARD_CHUNK": 4, "BACKWARD_CHUNK": 4, "LONGEST": 8, "SHORTEST": 8}.items():
        monkeypatch.setattr(gpu, name, tokens)


def check(arguments, segment_ids, activation="silu"):
    """The kernels no further from the float64 reference than the XLA form, but for float32's rounding."""
    dtype = arguments["x"].dtype.type
    with hopper.kernels():
        found = value_and_gradients(arguments, segment_ids, "pallas", activation)
    of_xla = value_and_gradients(arguments, segment_ids, "xla", activation)
    assert {name: a.dtype for name, a in found.items()} == {name: a.dtype for name, a in of_xla.items()}
    with jax.enable_x64(True):
        exact = {name: a.astype(jnp.float64) for name, a in arguments.items()}
        exact = value_and_gradients(exact, segment_ids, "reference", activation)
        off, xla_off = tree_errors(found, exact), tree_errors(of_xla, exact)
    assert max(off.values()) < BOUND[dtype], off
    assert all(off[name] < 1.1 * xla_off[name] + BOUND[jnp.float32] for name in off), (off, xla_off)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_documents_over_blocks(small_chunks, dtype):
    segment_ids = jnp.tile(ROWS, (1, 2))[2:4, :21]  # padding on both sides and between; the last block goes on after the last token
    check(example(0, *segment_ids.shape, 3, 4, dtype), segment_ids)


def test_padding_inside_documents(small_chunks):
    check(example(1, 2, 13, 3, 4), ROWS[4:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_document_of_whole_blocks(small_chunks, dtype):
    arguments = example(2, 1, 24, 256, 4, dtype)
    assert gpu.plan(arguments["x"], arguments["weight"]) == gpu.Plan(kept=3, tokens=24, block=8, channels=256, width=256)
    check(arguments, None)


@pytest.mark.parametrize("T, W, activation", [(1, 4, "silu"), (2, 3, None), (9, 2, None), (11, 4, None)])
def test_lengths_taps_and_no_activation(small_chunks, T, W, activation):
    check(example(T, 1, T, 130, W), None, activation)


def test_padding_leaks_nothing(small_chunks):
    arguments, segment_ids = example(5, 1, 13, 3, 4), ROWS[3:4]
    padding = (segment_ids == 0)[:, :, None]

    def outputs(x):
        y, pull = jax.vjp(
            lambda x, weight: causal_conv(x, weight, segment_ids=segment_ids, implementation="pallas")[0], x, arguments["weight"]
        )
        return y, *pull(jnp.where(padding, jnp.nan, jnp.cos(x)))

    with hopper.kernels():
        clean, dirty = (jax.jit(outputs)(jnp.where(padding, value, arguments["x"])) for value in (0, jnp.nan))
    assert max(tree_errors(dirty, clean).values()) == 0.0
    assert not np.any(np.where(padding, dirty[0], 0)) and not np.any(np.where(padding, dirty[1], 0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("B, T, D, mean_length", [(1, 300, 130, 40), (2, 64, 5, 3), (2, 128, 256, None), (1, 1, 130, None)])
def test_chunks_as_they_are(dtype, B, T, D, mean_length):
    segment_ids = None if mean_length is None else random_segment_ids(np.random.default_rng(T), B, T, mean_length)
    check(example(T, B, T, D, 4, dtype), segment_ids)


@pytest.mark.parametrize("chunk", [gpu.FORWARD_CHUNK, gpu.BACKWARD_CHUNK])
def test_runs_of_chunks_of_one_document(chunk):
    T, rng = 300, np.random.default_rng(chunk)
    index = np.cumsum(rng.random((2, T)) < 0.02, axis=1)
    index[:, 150:200], index[1, :5] = -1, -1
    x, weight = jnp.zeros((2, T, 128)), jnp.zeros((128, 4))
    plan = gpu.plan(x, weight)
    *_, documents, ends = gpu._operands(plan, chunk, x, weight, jnp.zeros((2, 3, 128)), jnp.asarray(index, jnp.int32))
    assert documents.shape == (2, 3 + plan.blocks * plan.block + 3)
    count = plan.block // chunk
    for row, found in zip(index, np.asarray(ends), strict=True):
        row = [0] * 3 + row.tolist() + [-1] * (plan.blocks * plan.block - T)
        around = [row[t : t + chunk + 3] for t in range(0, plan.blocks * plan.block, chunk)]
        mixed = [len(set(each)) > 1 or -1 in each for each in around]
        expected = [next((m for m in range(n, count) if mixed[b * count + m]), count) for b in range(plan.blocks) for n in range(count)]
        assert found.tolist() == expected


@pytest.mark.parametrize(
    "B, T, D, block", [(1, 32768, 1024, 256), (16, 2048, 3072, 256), (1, 2048, 1024, 32), (4, 4096, 1024, 128), (1, 5, 3, 32)]
)
def test_the_plan_fills_the_card(B, T, D, block):
    plan = gpu.plan(jnp.zeros((B, T, D), jnp.bfloat16), jnp.zeros((D, 4)))
    assert plan.block == block and plan.blocks == -(-T // block)
    if block > gpu.SHORTEST:
        assert B * plan.blocks * D // plan.width >= gpu.BLOCKS


def kernels_in(module):
    return module.count("mosaic_gpu_v2")


@pytest.mark.parametrize("D, kernels", [(128, 2), (64, 0)])  # 64 would be padded to 128 channels, twice the bytes
def test_lowered_for_hopper_none_is_the_kernel(D, kernels):
    def loss(arguments):
        y, state = causal_conv(**arguments, activation="silu")
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    arguments = example(0, 1, 512, D, 4, jnp.bfloat16)
    assert kernels_in(hopper.lowered(jax.value_and_grad(loss), arguments)) == kernels


def test_it_is_lowered_under_vmap():
    arguments = example(0, 2, 32, 128, 4, jnp.bfloat16)
    run = jax.vmap(lambda x: causal_conv(x[None], arguments["weight"]))
    assert kernels_in(hopper.lowered(run, arguments["x"])) == 1


@pytest.mark.slow
def test_documents_are_lowered_under_shard_map():
    spec = jax.sharding.PartitionSpec("x")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=hopper.H200)
    segment_ids = jnp.ones((1, 64), jnp.int32)
    given = (spec, jax.sharding.PartitionSpec(), spec)
    run = jax.shard_map(lambda x, w, ids: causal_conv(x, w, segment_ids=ids), mesh=mesh, in_specs=given, out_specs=spec, check_vma=False)
    gradient = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(run(x, w, segment_ids)[0].astype(jnp.float32)), (0, 1)))
    custom_call = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    arguments = example(0, 1, 64, 128, 4, jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(gradient, platforms=["cuda"], disabled_checks=[custom_call])(arguments["x"], arguments["weight"])
    assert kernels_in(exported.mlir_module()) == 4  # each pass of tokens as they stand, and of tokens moved together


@pytest.mark.parametrize(
    "dtype, W, message",
    [
        (jnp.float16, 4, "x has dtype float16, needs float32 or bfloat16 for implementation='pallas'"),
        (jnp.bfloat16, 5, r"weight has shape \(128, 5\), needs 2 to 4 taps in its last axis for implementation='pallas'"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name_and_not_chosen(monkeypatch, dtype, W, message):
    monkeypatch.setattr(platforms, "generation", lambda: "hopper")
    x, weight = jnp.zeros((1, 4, 128), dtype), jnp.zeros((128, W))
    with pytest.raises(ValueError, match=f"causal_conv: {message}"):
        causal_conv(x, weight, implementation="pallas")
    assert causal_conv(x, weight)[0].dtype == dtype
