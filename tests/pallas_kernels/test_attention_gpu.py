"""Attention's kernels for Hopper, interpreted, against the reference in float32; lowered for a card; and what they refuse."""

import heapq
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from pallas_kernels import platforms
from pallas_kernels.attention import attention, attention_stretch, gpu, gpu_schedule, reference
from pallas_kernels.attention.reach import ranges
from pallas_kernels.segments import number
from tests.helpers import random_segment_ids, tree_errors
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.gpu


def example(seed, B, T, H, HK, K, V):
    rng = np.random.default_rng(seed)
    shapes = {"q": (B, T, H, K), "k": (B, T, HK, K), "v": (B, T, HK, V)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in shapes.items()}


def value_and_gradients(arguments, run=attention, **options):
    def loss(arguments):
        output = run(**arguments, **options)
        wave = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        return jnp.sum(output.astype(jnp.float32) * wave), output

    (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(arguments)
    return {"output": output, **gradients}


by_kernels = partial(attention, implementation="pallas")


def check(arguments, run=by_kernels, programs=132, **options):
    """The kernels round where the XLA form does: to bfloat16, the weights and the gradients of the scores."""
    with hopper.kernels(), mock.patch.object(platforms, "multiprocessors", lambda: programs):
        output = value_and_gradients(arguments, run, **options)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    wanted = value_and_gradients(wide, implementation="reference", **options)
    narrow = tree_errors(value_and_gradients(arguments, implementation="xla", **options), wanted)
    errors = tree_errors(output, wanted)
    for name, error in errors.items():
        assert error <= 1.5 * narrow[name], (name, errors, narrow)


IDS = jnp.asarray(np.repeat([[0, 1, 2, 0, 3]], [5, 60, 90, 5, 40], axis=1))


def test_documents_and_padding():
    """Of two tiles, which one program goes through."""
    check(example(0, 1, 200, 1, 1, 64, 16), programs=1, segment_ids=IDS)


@pytest.mark.slow
@pytest.mark.parametrize("programs", [3, 132])
def test_shared_keys(programs):
    check(example(0, 1, 200, 4, 2, 64, 64), programs=programs, segment_ids=IDS)


@pytest.mark.slow
@pytest.mark.parametrize("K, V", [(128, 64), (128, 128)])
def test_programs_of_many_tiles(K, V):
    """Of which some have more than others; of 128 channels there is room for one tile at a time."""
    ids = random_segment_ids(np.random.default_rng(5), 2, 500, mean_length=150)
    check(example(5, 2, 500, 1, 1, K, V), programs=3, segment_ids=jnp.asarray(ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    "T, K, V, window",
    [(128, 64, 64, None), (128, 64, 64, 1), (257, 16, 48, 70), (300, 128, 64, None), (300, 128, 128, 200), (1, 64, 64, None)],
)
def test_random_documents(T, K, V, window):
    ids = random_segment_ids(np.random.default_rng(T), 2, T)
    check(example(1, 2, T, 2, 2, K, V), segment_ids=jnp.asarray(ids), window=window)


@pytest.mark.slow
def test_rows_of_one_document_on_a_machine_without_cudnn():
    check(example(2, 1, 384, 3, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale):
    check(example(9, 1, 40, 1, 1, 64, 64), segment_ids=IDS[:, 40:80], scale=scale)


def test_a_row_of_padding_is_zero_and_gives_no_gradients():
    arguments = {name: jnp.full_like(x, jnp.nan) for name, x in example(3, 1, 16, 1, 1, 16, 16).items()}
    with hopper.kernels():
        output = value_and_gradients(arguments, implementation="pallas", segment_ids=jnp.zeros((1, 16), jnp.int32))
    assert all(not np.any(np.asarray(x, np.float32)) for x in output.values())


@pytest.mark.slow
@pytest.mark.parametrize("T, H, window", [(128, 1, None), (128, 2, 150), (256, 1, None), (256, 1, 40)])
def test_stretches(T, H, window):
    """The queries of the first and the last of three stretches, against the keys of all; the one between by the XLA form."""

    def dealt(q, k, v, segment_ids, window):
        outer = jnp.concatenate([q[:, :T], q[:, 2 * T :]], axis=1)
        outer = gpu.attention_stretch(outer, k, v, 64**-0.5, window, number(segment_ids), jnp.array([0, 2]))
        inner = attention(q, k, v, window=window, segment_ids=segment_ids, implementation="xla")[:, T : 2 * T]
        return jnp.concatenate([outer[:, :T], inner, outer[:, T:]], axis=1)

    ids = jnp.asarray(random_segment_ids(np.random.default_rng(T), 1, 3 * T, mean_length=100))
    given = jax.tree.map(lambda x: jnp.where((ids != 0)[:, :, None, None], x, 0), example(8, 1, 3 * T, H, 1, 64, 64))
    check(given, dealt, segment_ids=ids, window=window)


def test_what_is_behind_the_last_token_costs_nothing():
    """Rows of 130 and of no real tokens, in three tiles of 128: blocks of 64 keys, and of queries, that each tile goes through."""
    real = jnp.stack([jnp.arange(384) < 130, jnp.zeros(384, bool)])
    reach = ranges(number(jnp.where(real, 1, 0)), None)
    assert gone_through(gpu_schedule.blocks_of_keys(64, reach, jnp.arange(3))).tolist() == [[2, 4, 0], [0, 0, 0]]
    assert gone_through(gpu_schedule.blocks_of_queries(64, reach, jnp.arange(3))).tolist() == [[3, 1, 0], [0, 0, 0]]


def gone_through(visits):
    return visits[..., 3] - visits[..., 0]


@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_gone_through_once_each_and_the_whole_ones_last(seed):
    """All that a token attends to is in its tile's blocks; in those that are not looked at closely all attend to all."""
    rng = np.random.default_rng(seed)
    T, block, window = 1024, int(rng.choice([64, 128])), rng.choice([None, 200])
    lengths = float(rng.choice([60, 500, 5000]))
    segments = number(jnp.asarray(random_segment_ids(rng, 1, T, mean_length=lengths))) if seed % 4 else number(jnp.ones((1, T), jnp.int32))
    reach = ranges(segments, window)
    first, last, key = (np.asarray(x)[0] for x in (reach.first, reach.last, reach.key))
    attends = (first[:, None] <= key) & (key <= last[:, None])
    places = jnp.arange(T // gpu.TILE, dtype=jnp.int32)
    of_queries, of_keys = (blocks(block, reach, places) for blocks in (gpu_schedule.blocks_of_keys, gpu_schedule.blocks_of_queries))
    for visits, pairs in ((of_queries, attends), (of_keys, attends.T)):
        tiles = pairs.reshape(len(places), gpu.TILE, T // block, block).swapaxes(1, 2)
        for tile, of_tile in enumerate(gpu_schedule.Visits(*row) for row in np.asarray(visits)[0]):
            gone = [int(of_tile.block(step)) for step in range(of_tile.steps)]
            assert sorted(gone) == list(range(of_tile.begin, of_tile.end)) and of_tile.begin <= of_tile.whole <= of_tile.whole_end
            assert set(np.flatnonzero(tiles[tile].any((1, 2)))) <= set(gone)
            assert tiles[tile][gone[of_tile.checked :]].all()
            if seed % 4 == 0 and window is None:  # one document: all but the blocks on the diagonal
                assert of_tile.checked == gpu.TILE // block


@pytest.mark.parametrize("B, H, tiles, programs", [(1, 16, 256, 132), (16, 16, 16, 132), (2, 3, 5, 7), (1, 2, 3, 132), (3, 1, 1, 1)])
def test_every_tile_is_dealt_out_once(B, H, tiles, programs):
    rng = np.random.default_rng(tiles)
    begin, whole, length = (rng.integers(0, 9, (B, tiles)) for _ in range(3))
    visits = np.stack(gpu_schedule.Visits(begin, begin + whole, begin + whole, begin + whole + length), axis=2)
    items = np.asarray(jax.jit(gpu_schedule.dealt, static_argnums=(1, 2))(jnp.asarray(visits, jnp.int32), H, programs))
    assert len(items) <= B * H * tiles or len(items) == programs
    of_all = [item for program in items for item in program if item[0] >= 0]
    assert sorted(tuple(item[:3]) for item in of_all) == [(b, tile, h) for b in range(B) for tile in range(tiles) for h in range(H)]
    assert all((item[3:7] == visits[item[0], item[1]]).all() for item in of_all)
    for *program, behind in items:
        count = sum(item[0] >= 0 for item in program)
        steps = [gpu_schedule.Visits(*item[3:7]).steps for item in program]
        assert all(item[0] < 0 for item in program[count:]) and behind[:2].tolist() == [-1, count] and behind[7] == sum(steps)
        assert [item[7] for item in program[:count]] == [sum(steps[:n]) for n in range(count)]


@pytest.mark.parametrize("documents", [[512] * 64, [8192] * 4, [32768], "random"])
def test_programs_have_much_the_same_to_do(documents):
    """With programs begun in their order, each where one ends: of 16 heads of 32k tokens, at most 6% more than a 132nd."""
    if documents == "random":
        documents = np.random.default_rng(0).lognormal(7.0, 0.8, 60).astype(int) + 16
    ids = np.repeat(np.arange(len(documents)) + 1, documents)[None, :32768]

    @jax.jit
    def steps(ids):
        reach, places = ranges(number(ids), None), jnp.arange(256, dtype=jnp.int32)
        both = gpu_schedule.blocks_of_keys(128, reach, places), gpu_schedule.blocks_of_queries(128, reach, places)
        return [gpu_schedule.dealt(visits, 16, 132)[:, -1, 7] for visits in both]

    for of_programs in map(np.asarray, steps(jnp.asarray(ids))):
        done = [0] * 132
        for steps_of_one in of_programs.tolist():
            heapq.heapreplace(done, done[0] + steps_of_one)
        assert max(done) <= 1.06 * of_programs.sum() / 132, (max(done), of_programs.sum() / 132)


def test_lowered_for_a_card():
    arguments = example(4, 2, 200, 4, 2, 128, 64)
    ids = jnp.asarray(random_segment_ids(np.random.default_rng(0), 2, 200))
    text = hopper.lowered(lambda arguments: value_and_gradients(arguments, segment_ids=ids), arguments)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3


def test_lowered_inside_shard_map():
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))  # of more devices than a card is
    row, whole = PartitionSpec("data"), example(7, 2, 64, 2, 2, 64, 64)

    def local(arguments, ids):
        return value_and_gradients(arguments, segment_ids=ids, implementation="pallas")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(row, row), out_specs=row)
    assert calls_on_hopper(sharded, whole, jnp.ones((2, 64), jnp.int32)) == 3


@pytest.mark.parametrize("window", [None, 70])
def test_stretches_are_lowered_inside_shard_map(window):
    """Of 100 tokens, which are no whole tiles; and by None."""
    mesh = AbstractMesh((2,), ("seq",), axis_types=(AxisType.Auto,))
    stretch, whole = PartitionSpec(None, "seq"), example(7, 1, 200, 2, 2, 64, 64)

    def local(arguments):
        return value_and_gradients(arguments, partial(attention_stretch, axis_name="seq", window=window))

    assert calls_on_hopper(jax.shard_map(local, mesh=mesh, in_specs=stretch, out_specs=stretch, check_vma=False), whole) == 3


def calls_on_hopper(function, *arguments):
    with mock.patch.object(platforms, "generation", lambda: "hopper"):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize("window", [None, 5])
def test_what_cudnn_is_asked_for_is_this_operator(window):
    arguments = jax.tree.map(lambda x: x.astype(jnp.float32), example(5, 2, 24, 4, 2, 16, 16))
    output = gpu._by_cudnn(**arguments, scale=0.3, window=window, implementation="xla")
    errors = tree_errors(output, reference.attention(**arguments, scale=0.3, window=window, segments=None))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    "T, K, HK, window, by_cudnn",
    [(64, 128, 4, 9, True), (2, 40, 2, None, True), (65, 64, 2, None, False), (64, 20, 4, None, False)],
)
def test_what_cudnn_is_asked_for_it_takes(T, K, HK, window, by_cudnn):
    """On a card of this generation, with its gradients; JAX itself refuses what cuDNN cannot do."""
    arguments = {name: jax.ShapeDtypeStruct((2, T, heads, K), jnp.bfloat16) for name, heads in (("q", 4), ("k", HK), ("v", HK))}
    program = jax.jit(lambda arguments: value_and_gradients(arguments, window=window, implementation="pallas"))
    card = {"check_cudnn_version": lambda: 91002, "check_compute_capability": lambda _: True}
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.multiple("jax._src.cudnn.fused_attention_stablehlo", **card),
        mock.patch.object(platforms, "generation", lambda: "hopper"),
    ):
        text = program.trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert ("__cudnn$fmha" in text) == by_cudnn and (text.count("stablehlo.custom_call @mosaic_gpu") == 3) != by_cudnn


def test_what_the_kernels_do_not_take():
    arguments = example(6, 1, 8, 1, 1, 136, 16)
    with hopper.kernels():
        with pytest.raises(ValueError, match="q has heads of 136, needs 128 at most"):
            attention(**arguments, implementation="pallas")
        with pytest.raises(ValueError, match="v has dtype float32, needs bfloat16"):
            attention(**example(6, 1, 8, 1, 1, 16, 16) | {"v": jnp.zeros((1, 8, 1, 16))}, implementation="pallas")
        assert attention(**arguments).shape == (1, 8, 1, 16)  # by the XLA form
