"""The Hopper kernels of linear attention with decay, interpreted: against the reference in float64, and their contract."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pallas_kernels.gated_linear_attention import gated_linear_attention, gpu, gpu_walk, shapes
from tests.helpers import relative_error
from tests.pallas_kernels import hopper
from tests.pallas_kernels.test_gated_linear_attention import Case, documents, errors, example

pytestmark = pytest.mark.gpu
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    [
        Case(140, "head", documents=True, B=1, H=1, HV=1, K=64, V=64),
        Case(100, "channel", documents=True, B=1, H=1, HV=1, K=64, V=64),
        Case(64, "channel", "medium", B=1, H=1, HV=1, K=128, V=64),
        pytest.param(Case(128, "head", "strong", B=1, H=1, HV=1, K=64, V=64), marks=slow),
        pytest.param(Case(256, "fixed", "weak", B=1, H=1, HV=2, K=64, V=64), marks=slow),  # grouped values
        pytest.param(Case(128, "head", "none", B=2, H=1, HV=1, K=192, V=128), marks=slow),  # more of a state than is in memory at once
        pytest.param(Case(300, "head", documents=True, B=1, H=1, HV=1, K=128, V=256), marks=slow),
        pytest.param(Case(128, "channel", "strong", B=1, H=1, HV=1, K=64, V=64), marks=slow),
        pytest.param(Case(128, "channel", "weak", B=1, H=1, HV=2, K=64, V=64), marks=slow),
        pytest.param(Case(64, "channel", "none", B=2, H=1, HV=1, K=128, V=192), marks=slow),
        pytest.param(Case(200, "channel", documents=True, B=1, H=1, HV=1, K=128, V=256), marks=slow),
        # Memory that is loaded into again: of chunks in the gradients, of slices of the keys.
        pytest.param(Case(640, "head", documents=True, B=1, H=1, HV=1, K=64, V=64), marks=slow),
        pytest.param(Case(64, "channel", "weak", B=1, H=1, HV=1, K=192, V=64), marks=slow),
    ],
    ids=str,
)
def test_matches_the_reference(case):
    _matches_the_reference(case)


@pytest.mark.slow
# Chunks a piece at least: with four the memory of one is loaded into again; of 600 tokens the last piece has fewer than others.
@pytest.mark.parametrize("T, least", [(512, 1), (600, 3), (1024, 4)])
@pytest.mark.parametrize("axes", ["head", "channel"])
def test_matches_the_reference_in_pieces(axes, T, least, monkeypatch):
    case = Case(T, axes, documents=True, B=1, H=1, HV=1, K=64, V=64)
    monkeypatch.setattr(gpu_walk, "LEAST", least)
    _matches_the_reference(case)


@given(walks=st.integers(1, 600), chunks=st.integers(1, 1024), every=st.sampled_from([1, 2]))
def test_pieces_hold_every_chunk_and_fill_the_multiprocessors(walks, chunks, every):
    plan = gpu_walk.Plan.of(walks, chunks * every, every, even=True)
    assert (plan.pieces - 1) * plan.chunks < chunks * every <= plan.pieces * plan.chunks and plan.chunks % every == 0
    assert plan.pieces == 1 or plan.chunks >= gpu_walk.LEAST and walks * plan.pieces <= 2 * gpu_walk.MULTIPROCESSORS
    assert (plan.groups == 2) == (walks * plan.pieces > gpu_walk.MULTIPROCESSORS)


def _matches_the_reference(case):
    segment_ids = documents(1, case)
    arguments = example(1, case, segment_ids)
    with hopper.kernels():
        found = errors(arguments, segment_ids, "pallas", jnp.bfloat16, state_dtype=jnp.float32)
    # Operands of products are rounded to 2^-9 two or three times in a row, and outputs once; in the form for XLA only outputs are, to 2e-3.
    assert max(found.values()) < 4e-3, found


# Named shapes, and how many kernels each is.
LOWERED = [(("simple_gla_340m", 5), ()), (("retnet_1b3", 5), pytest.mark.slow), (("hgrn2_340m", 6), ()), (("gla_1b3", 6), pytest.mark.slow)]


@pytest.mark.parametrize("name, kernels", [pytest.param(*case, marks=marks) for case, marks in LOWERED])
def test_chosen_where_it_is_lowered_for_hopper(name, kernels):
    shape = shapes.SHAPES[name]
    arguments = jax.eval_shape(lambda: shapes.inputs(shape, jax.random.key(0), jnp.bfloat16))

    def loss(arguments):
        o, state = gated_linear_attention(**arguments)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

    # There are too few heads: each walk is in pieces, and has a kernel more.
    assert hopper.lowered(jax.value_and_grad(loss), arguments).count("@mosaic_gpu_v2") == kernels


@pytest.mark.parametrize("axes", ["head", pytest.param("channel", marks=pytest.mark.slow)])
def test_inside_shard_map_vmap_and_checkpoint(axes):
    case = Case(64, axes, B=2, H=1, HV=2, K=64, V=64)
    arguments = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in example(0, case).items()}

    def loss(arguments):
        return jnp.sum(gated_linear_attention(**arguments)[0].astype(jnp.float32) ** 2)

    gradient, rows = jax.grad(jax.checkpoint(loss)), PartitionSpec("x")
    several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), arguments)
    assert "@mosaic_gpu_v2" in hopper.lowered(lambda x: jax.shard_map(gradient, in_specs=rows, out_specs=rows)(x), arguments)
    assert "@mosaic_gpu_v2" in hopper.lowered(jax.vmap(gradient), several)


def test_what_the_kernel_does_not_take_is_refused_by_name_and_not_chosen():
    for case, dtype, message in (
        (Case(5, "head", K=64, V=64), jnp.float32, "q has dtype float32, needs bfloat16"),
        (Case(5, "head", K=64, V=48), jnp.bfloat16, "v has shape .*, needs heads whose size is a multiple of 64"),
        (Case(5, "head", K=320, V=64), jnp.bfloat16, "k has shape .*, needs heads of at most 256"),
    ):
        given = {name: jnp.asarray(x, dtype) for name, x in example(0, case).items()}
        assert not gpu.is_faster(*(given[name] for name in ("q", "k", "v", "log_decay")))
        with hopper.kernels():
            with pytest.raises(ValueError, match=f"{message} for implementation='pallas' on a Hopper GPU; choose 'xla'"):
                gated_linear_attention(**given, implementation="pallas")
            o, _ = gated_linear_attention(**given)
        assert relative_error(o, gated_linear_attention(**given, implementation="xla")[0]) < 1e-6
