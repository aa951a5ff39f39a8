"""The Hopper kernels of the elementwise recurrence, in the interpreter that looks for races, and lowered for a card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platforms
from pallas_kernels.linear_scan import gpu, linear_scan
from tests.helpers import random_segment_ids, tree_errors
from tests.pallas_kernels import hopper
from tests.pallas_kernels.test_linear_scan import ROWS, errors, example, value_and_gradients

pytestmark = pytest.mark.gpu

# h is rounded to bfloat16 before the gradient of the decay takes it, and that once more: each by 2^-9 at most.
BOUND = {jnp.float32: 1e-6, jnp.bfloat16: 2**-8}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 tokens, two of them in memory at once, pieces from 12: the memory of a chunk is loaded into again."""
    monkeypatch.setattr(gpu, "CHUNK", 4)
    monkeypatch.setattr(gpu, "SHORTEST", 12)
    monkeypatch.setattr(gpu, "FORWARD_STAGES", 2)
    monkeypatch.setattr(gpu, "BACKWARD_STAGES", 2)


def found_errors(arguments, segment_ids, dtype):
    with hopper.kernels():
        return errors(arguments, segment_ids, "pallas", dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_pieces_chunks_and_documents(small_chunks, dtype):
    segment_ids = np.tile(ROWS, (1, 3))[2:4, :30]  # padding on both sides and between; two pieces of four chunks
    assert gpu.plan(2, 30, 3) == gpu.Plan(tokens=32, channels=128, pieces=2)
    found = found_errors(example(0, 2, 30, 3, segment_ids), segment_ids, dtype)
    assert max(found.values()) < BOUND[dtype], found


@pytest.mark.parametrize("T, D", [(3, 130), (13, 2)])
def test_one_document(small_chunks, T, D):
    found = found_errors(example(T, 1, T, D), None, jnp.float32)
    assert max(found.values()) < BOUND[jnp.float32], found


def test_a_float32_decay_beside_bfloat16(small_chunks):
    arguments = jax.tree.map(jnp.float32, example(5, 1, 16, 3))
    arguments["x"] = arguments["x"].astype(jnp.bfloat16)
    expected = value_and_gradients(arguments, None, "xla")
    with hopper.kernels():
        found = value_and_gradients(arguments, None, "pallas")
    assert {name: a.dtype for name, a in found.items()} == {name: a.dtype for name, a in expected.items()}
    off = tree_errors(found, expected)
    assert max(off.values()) < BOUND[jnp.bfloat16] and off["['initial_state']"] < 1e-6, off


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("B, T, D, mean_length", [(1, 300, 130, 40), (3, 64, 5, 3), (2, 130, 2, None), (1, 1, 1, None)])
def test_chunks_as_they_are(monkeypatch, dtype, B, T, D, mean_length):
    monkeypatch.setattr(gpu, "SHORTEST", 64)
    segment_ids = None if mean_length is None else random_segment_ids(np.random.default_rng(T), B, T, mean_length)
    found = found_errors(example(T, B, T, D, segment_ids), segment_ids, dtype)
    assert max(found.values()) < BOUND[dtype], found


@pytest.mark.parametrize(
    "B, T, D, pieces", [(1, 32768, 1024, 16), (4, 8192, 1024, 4), (16, 2048, 1024, 1), (1, 32768, 2048, 8), (1, 100, 128, 1)]
)
def test_the_plan_fills_the_card_and_no_more(B, T, D, pieces):
    plan = gpu.plan(B, T, D)
    assert plan.pieces == pieces and pieces * B * D // 128 <= gpu.MULTIPROCESSORS
    assert T <= plan.tokens == plan.pieces * plan.chunks * gpu.CHUNK < T + pieces * gpu.CHUNK


def kernels_in(module):
    return module.count("mosaic_gpu_v2")


def gradient(implementation, arguments):
    def loss(arguments):
        h, state = linear_scan(**arguments, implementation=implementation)
        return jnp.sum(h.astype(jnp.float32)) + jnp.sum(state)

    return lambda: hopper.lowered(jax.grad(loss), arguments)


def test_lowered_for_hopper_none_is_the_kernel():
    arguments = jax.tree.map(jnp.bfloat16, example(0, 1, 512, 128))
    assert kernels_in(gradient(None, arguments)()) == 4  # two pieces: forward, backward and what the first does to each
    arguments = jax.tree.map(jnp.bfloat16, example(0, 1, 512, 64))
    assert kernels_in(gradient(None, arguments)()) == 0  # padded to 128 channels, it would be twice the bytes
    assert kernels_in(gradient("pallas", arguments)()) == 4


def test_it_is_lowered_under_vmap():
    x = jnp.zeros((2, 1, 32, 128), jnp.bfloat16)
    assert kernels_in(hopper.lowered(jax.vmap(linear_scan), x, x)) == 1


def test_it_is_lowered_under_shard_map():
    """Whose results have to vary over the mesh as the other implementation's do."""
    x, spec = jnp.zeros((1, 32, 128), jnp.bfloat16), jax.sharding.PartitionSpec("x")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=hopper.H200)
    sharded = jax.shard_map(linear_scan, mesh=mesh, in_specs=spec, out_specs=spec)
    gradient = jax.jit(jax.grad(lambda a, x: jnp.sum(sharded(a, x)[0].astype(jnp.float32))))
    custom_call = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(gradient, platforms=["cuda"], disabled_checks=[custom_call])(x, x)
    assert kernels_in(exported.mlir_module()) == 2


def test_float16_is_refused_by_name_and_not_chosen(monkeypatch):
    monkeypatch.setattr(platforms, "generation", lambda: "hopper")
    x = jnp.zeros((1, 4, 128), jnp.float16)
    with pytest.raises(ValueError, match="linear_scan: decay has dtype float16, needs float32 or bfloat16 for implementation='pallas'"):
        linear_scan(x, x, implementation="pallas")
    assert linear_scan(x, x)[0].dtype == jnp.float16
