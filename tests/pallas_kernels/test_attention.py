"""Attention against a numpy loop, its two implementations against each other, and its contract."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import segments
from pallas_kernels.attention import attention, attention_prefill, attention_step, reference, tpu, xla
from pallas_kernels.attention.api import IMPLEMENTATIONS
from pallas_kernels.attention.reach import ranges, ranges_of_whole_rows
from tests.helpers import random_segment_ids, tree_errors

HARD = jnp.asarray(  # documents of a row of 37 tokens, as (id, length); an id used again, padding left, right, between and inside
    [
        np.repeat([1], [37]),
        np.repeat([1, 2, 1, 3, 2], [1, 17, 3, 15, 1]),
        np.repeat([0, 4, 0, 4, 0, 5, 0], [5, 9, 3, 4, 7, 6, 3]),
        np.repeat([2, 0, 2, 0], [1, 30, 1, 5]),
        np.repeat([0], [37]),
    ]
)


def example(seed, B, T, H, HK, K, V, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"q": (B, T, H, K), "k": (B, T, HK, K), "v": (B, T, HK, V)}
    return {name: jnp.asarray(rng.normal(size=shape) * 2, dtype) for name, shape in shapes.items()}


def numpy_loop(q, k, v, segment_ids, window=None):
    """The definition, a token at a time: the documents' tokens in a list, the last ``window`` of them attended to."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[2] // k.shape[2]
    output = np.zeros((*q.shape[:3], v.shape[3]))
    for b, row in enumerate(np.asarray(segment_ids)):
        seen, document = [], None
        for t, segment in enumerate(row):
            if segment == 0:
                continue
            seen = [*seen, t] if segment == document else [t]
            document = segment
            attended = seen[-window:] if window else seen
            for h in range(q.shape[2]):
                scores = k[b, attended, h // group] @ q[b, t, h] * q.shape[3] ** -0.5
                weights = np.exp(scores - scores.max())
                output[b, t, h] = weights @ v[b, attended, h // group] / weights.sum()
    return output


@partial(jax.jit, static_argnames=("implementation", "window"))
def value_and_gradients(arguments, segment_ids, implementation, window=None):
    """The output, and the gradients of a random-looking function of it."""

    def loss(arguments):
        output = attention(**arguments, segment_ids=segment_ids, window=window, implementation=implementation)
        wave = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        return jnp.sum(output.astype(jnp.promote_types(output.dtype, jnp.float32)) * wave), output

    (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(arguments)
    return {"output": output, **gradients}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8, so that short rows have many: not a multiple of T, longer and shorter than documents."""
    monkeypatch.setattr(xla, "BLOCK", 8)
    value_and_gradients.clear_cache()
    yield
    value_and_gradients.clear_cache()


@pytest.mark.parametrize("window", [None, 5])
def test_reference_matches_a_numpy_loop(window):
    with jax.enable_x64(True):
        arguments = example(0, *HARD.shape, 4, 2, 3, 5, jnp.float64)
        output = value_and_gradients(arguments, HARD, "reference", window)["output"]
        errors = tree_errors(output, numpy_loop(**arguments, segment_ids=HARD, window=window))
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("H, HK, window", [(2, 2, None), (4, 2, None), (2, 1, 5), (2, 2, 1)])
def test_xla_matches_reference_in_float64(small_blocks, H, HK, window):
    with jax.enable_x64(True):
        arguments = example(1, *HARD.shape, H, HK, 3, 5, jnp.float64)
        out = value_and_gradients(arguments, HARD, "xla", window)
        errors = tree_errors(out, value_and_gradients(arguments, HARD, "reference", window))
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("T, window", [(1, None), (9, 3), (150, None), (300, 140)])
def test_any_length_without_segments(T, window):
    with jax.enable_x64(True):
        arguments = example(2, 2, T, 2, 1, 4, 3, jnp.float64)
        out = value_and_gradients(arguments, None, "xla", window)
        errors = tree_errors(out, value_and_gradients(arguments, None, "reference", window))
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize(
    "T, H, HK, window, documents, most_partial_dq",
    [(37, 4, 2, None, True, 8), (37, 2, 1, 5, True, 8), (300, 2, 1, 140, False, 8), (300, 2, 1, None, False, 1)],
)
def test_kernel_matches_reference(T, H, HK, window, documents, most_partial_dq, monkeypatch):
    """Kernels compute in float32: the reference does too, so that only the order of sums differs."""
    monkeypatch.setattr(tpu, "LARGEST_BLOCK", 256)
    monkeypatch.setattr(tpu, "LARGEST_COMPUTED", 128)
    monkeypatch.setattr(tpu, "MOST_PARTIAL_DQ", most_partial_dq)
    segment_ids = HARD if documents else None
    arguments = example(12, 5 if documents else 2, T, H, HK, 16, 24)
    out = value_and_gradients(arguments, segment_ids, "pallas", window)
    errors = tree_errors(out, value_and_gradients(arguments, segment_ids, "reference", window))
    assert max(errors.values()) < 1e-5, errors


def test_blocks_of_the_kernel_hold_any_length():
    for T in (1, 128, 129, 512, 513, 600, 1024, 1025, 1536, 2049, 131072):
        block = tpu.block_length(T)
        padding = -T % block
        assert block % (128 if block <= tpu.LARGEST_COMPUTED else 256) == 0 and block <= tpu.LARGEST_BLOCK
        assert padding < 256 * -(-T // tpu.LARGEST_BLOCK)


def test_random_documents(small_blocks):
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        for seed in range(8):
            segment_ids = random_segment_ids(rng, 2, 45, mean_length=rng.choice([1.5, 6.0, 25.0]), padding=rng.choice([0.0, 0.4]))
            arguments = example(seed, 2, 45, 2, 1, 3, 2, jnp.float64)
            window = [None, 6][seed % 2]
            out = value_and_gradients(arguments, segment_ids, "xla", window)
            errors = tree_errors(out, value_and_gradients(arguments, segment_ids, "reference", window))
            assert max(errors.values()) < 1e-12, (errors, segment_ids)


def test_blocks_out_of_reach_are_not_visited():
    def first_blocks(documents, window):
        return xla._reach(ranges(documents, window), 8).first_block.tolist()

    one = segments.one_segment(1, 40)
    assert first_blocks(one, None) == [0, 0, 0, 0, 0]
    assert first_blocks(one, 8) == [0, 0, 1, 2, 3]
    packed = jnp.repeat(jnp.asarray([1, 2, 1]), jnp.asarray([16, 10, 14]))
    assert first_blocks(segments.number(packed[None]), None) == [0, 0, 2, 2, 3]
    both = jnp.stack([packed, jnp.ones_like(packed)])  # a block is visited where any row needs it
    assert first_blocks(segments.number(both), None) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("window", [None, 1, 6])
def test_ranges_of_whole_rows_are_those_of_one_segment(window):
    said, counted = ranges_of_whole_rows(2, 13, window, padding=3), ranges(segments.one_segment(2, 13), window, padding=3)
    assert all(map(np.array_equal, said, counted))


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_precision(implementation, dtype, bound):
    """float32: scores of size 10 rounded to 1e-6 shift weights by as much. bfloat16: weights, score gradients and outputs are
    rounded to 2^-9 before they are multiplied, a few such roundings in a row."""
    arguments = example(4, 1, 300, 4, 2, 16, 8, dtype)
    segment_ids = jnp.repeat(jnp.asarray([1, 0, 1, 2, 3, 0]), jnp.asarray([60, 9, 70, 131, 17, 13]))[None]
    out = value_and_gradients(arguments, segment_ids, implementation)
    assert {a.dtype for a in out.values()} == {jnp.dtype(dtype)}
    with jax.enable_x64(True):
        exact = {name: a.astype(jnp.float64) for name, a in arguments.items()}
        errors = tree_errors(out, value_and_gradients(exact, segment_ids, "reference"))
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_neither_overflow_nor_lose_the_rest(small_blocks, implementation):
    """Masked scores are far above the allowed ones and those far above and below zero: exp never sees them raw."""
    with jax.enable_x64(True):
        arguments = example(5, 1, 20, 1, 1, 2, 3, jnp.float64)
        growing = jnp.linspace(-100, 100, 20, dtype=jnp.float64)[None, :, None, None]
        arguments = arguments | {"q": jnp.ones((1, 20, 1, 2)) * 10, "k": growing * jnp.ones((1, 20, 1, 2))}
        ids = jnp.ones((1, 20), jnp.int32)
        out = value_and_gradients({name: a.astype(jnp.float32) for name, a in arguments.items()}, ids, implementation)
        assert all(np.all(np.isfinite(a)) for a in out.values())
        errors = tree_errors(out["output"], numpy_loop(**arguments, segment_ids=ids))
    assert max(errors.values()) < 1e-4, errors  # scores of 1400 are rounded to 1e-4 in float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_leaks_nothing(implementation):
    arguments = example(6, *HARD.shape, 2, 1, 3, 5)
    clean = value_and_gradients(arguments, HARD, implementation)
    padding = (HARD == 0)[:, :, None, None]
    dirty = value_and_gradients({name: jnp.where(padding, jnp.nan, a) for name, a in arguments.items()}, HARD, implementation)
    assert max(tree_errors(dirty, clean).values()) == 0.0
    for array in dirty.values():
        assert not np.any(np.where(padding, array, 0))


def ring(arrays, length, slots):
    """The caches [B,HK,slots,K] in which slot t % slots holds token t of [B,T,HK,K] ``arrays``, for the tokens before ``length`` [B]."""
    caches = [np.full((len(length), a.shape[2], slots, a.shape[3]), 7.0, a.dtype) for a in arrays]
    for b, count in enumerate(length):
        for t in range(count):
            for cache, array in zip(caches, arrays, strict=True):
                cache[b, :, t % slots] = array[b, t]
    return [jnp.asarray(cache) for cache in caches]


@pytest.mark.parametrize("window, slots", [(None, 11), (3, 3), (3, 5)])
def test_steps_are_the_sequence(window, slots):
    T = 11
    arguments = example(7, 2, T, 4, 2, 3, 5)
    q, k, v = arguments.values()
    whole = attention(**arguments, window=window)
    step = jax.jit(partial(attention_step, window=window))
    for t in range(T):
        at = [t, max(t - 2, 0)]  # rows of a batch are at places of their own
        length = [t + 1 for t in at]
        output = step(q[jnp.arange(2), jnp.array(at)], *ring((k, v), length, slots), jnp.asarray(length, jnp.int32))
        assert max(tree_errors(output, whole[jnp.arange(2), jnp.array(at)]).values()) < 1e-6
    assert not np.any(step(q[:, 0], *ring((k, v), [0, 0], slots), jnp.zeros(2, jnp.int32)))


PREFILL = [  # a chunk's segment ids: none of it padding; on the left, on the right, between; everywhere
    [[1] * 12] * 3,
    [[0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0], [1] * 12, [0] * 12],
    [[0] * 11 + [3], [3] * 9 + [0] * 3, [0, 3, 3] * 4],
]


@pytest.mark.parametrize("window, slots", [(None, 33), (5, 16), (5, 24)])
def test_prefill_goes_on_from_a_cache(small_blocks, window, slots):
    """Against the whole row at once, in float64: the cached tokens in front of the chunk."""
    before, T = np.array([0, 7, 21]), 12
    with jax.enable_x64(True):
        run = jax.jit(partial(attention_prefill, window=window))
        for seed, ids in enumerate(PREFILL):
            ids = np.asarray(ids)
            length = before + (ids != 0).sum(axis=1)
            row = example(seed, 3, 21 + T, 4, 2, 3, 5, jnp.float64)
            ids = np.concatenate([np.where(np.arange(21) < before[:, None], ids.max(), 0), ids], axis=1)
            expected = numpy_loop(**row, segment_ids=ids, window=window)[:, 21:]
            real_first = np.argsort(ids == 0, axis=1, kind="stable")[:, :, None, None]
            k, v = (np.take_along_axis(np.asarray(row[name]), real_first, axis=1) for name in "kv")
            arguments = row["q"][:, 21:], *ring((k, v), length, slots), jnp.asarray(length)
            out = run(*arguments, segment_ids=jnp.asarray(ids[:, 21:]))
            assert max(tree_errors(out, expected).values()) < 1e-13
            out = reference.attention_prefill(*arguments, 3**-0.5, window, segments.number(jnp.asarray(ids[:, 21:])))
            assert max(tree_errors(out, expected).values()) < 1e-13


def test_prefill_memory_does_not_grow_with_the_cache():
    def temporaries(slots):
        q, cache = jax.ShapeDtypeStruct((1, 256, 4, 16), jnp.float32), jax.ShapeDtypeStruct((1, 4, slots, 16), jnp.float32)
        lowered = jax.jit(attention_prefill).lower(q, cache, cache, jax.ShapeDtypeStruct((1,), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(65536) < 1.2 * temporaries(4096) + 65536 * 8  # a few bytes a slot say which token it holds


def test_under_vmap_and_checkpoint():
    arguments = example(8, *HARD.shape, 2, 1, 3, 5)
    plain = value_and_gradients(arguments, HARD, "xla")

    def one_row(q, k, v, segment_ids):
        run = jax.checkpoint(jax.checkpoint(attention))
        return run(q[None], k[None], v[None], segment_ids=segment_ids[None])[0]

    @jax.jit
    def by_rows(*arrays):
        output, pull = jax.vjp(lambda q, k, v: jax.vmap(one_row)(q, k, v, HARD), *arrays)
        return output, *pull(jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape))

    errors = tree_errors(by_rows(*arguments.values()), tuple(plain[name] for name in ("output", *arguments)))
    assert max(errors.values()) < 1e-6, errors


def temporaries(implementation, T):
    """Bytes of scratch memory of forward and backward at length T."""
    shapes = jax.eval_shape(lambda: example(9, 1, T, 2, 1, 16, 16))
    return value_and_gradients.lower(shapes, None, implementation).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_time():
    assert temporaries("xla", 4096) < 2.2 * temporaries("xla", 2048)
    assert temporaries("reference", 2048) > 10 * temporaries("xla", 2048)


def test_compiles_for_tpu():
    shapes = jax.eval_shape(lambda: example(10, 2, 300, 4, 2, 16, 16, jnp.bfloat16))
    exported = jax.export.export(value_and_gradients, platforms=["tpu"])(
        shapes, jax.ShapeDtypeStruct((2, 300), jnp.int32), implementation="xla"
    )
    assert exported.platforms == ("tpu",)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.zeros((2, 5, 4))}, r"q has shape \(2, 5, 4\), needs 4 axes \[B,T,H,K\]"),
        ({"k": jnp.zeros((2, 6, 2, 3))}, r"k has shape \(2, 6, 2, 3\), needs \[B,T,HK,K\] with T=5 \(from q\)"),
        ({"v": jnp.zeros((2, 5, 1, 3))}, "v has shape .* with HK=2"),
        ({"q": jnp.zeros((2, 5, 3, 3))}, "q has 3 heads, needs a multiple of the 2 of k and v"),
        ({"q": jnp.zeros((2, 5, 4, 3), jnp.int32)}, "q has dtype int32, needs a floating-point"),
        ({"window": 0}, "window is 0, needs to be at least 1"),
        ({"segment_ids": jnp.zeros((2, 5))}, "segment_ids has dtype float32, needs integers"),
        ({"segment_ids": jnp.zeros((5, 2), jnp.int32)}, r"segment_ids has shape \(5, 2\)"),
        ({"implementation": "flash"}, "no implementation 'flash'"),
        ({"q": jnp.zeros((2, 5, 4, 3), jnp.float16), "implementation": "pallas"}, "q has dtype float16, needs float32 or bfloat16"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**(example(11, 2, 5, 4, 2, 3, 5) | change))


def test_bad_arguments_with_a_cache():
    q, cache, length = jnp.zeros((2, 5, 4, 3)), jnp.zeros((2, 2, 7, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="attention_step: length has dtype float32"):
        attention_step(q[:, 0], cache, cache, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"attention_step: length has shape \(3,\), needs \[B\] with B=2"):
        attention_step(q[:, 0], cache, cache, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="attention_step: q has 4 heads, needs a multiple of the 3"):
        attention_step(q[:, 0], jnp.zeros((2, 3, 7, 3)), jnp.zeros((2, 3, 7, 3)), length)
    with pytest.raises(ValueError, match="attention_prefill: v_cache has shape .* with S=7"):
        attention_prefill(q, cache, cache[:, :, 1:], length)
    with pytest.raises(ValueError, match=r"attention_prefill: segment_ids has shape \(2, 4\)"):
        attention_prefill(q, cache, cache, length, segment_ids=jnp.ones((2, 4), jnp.int32))
