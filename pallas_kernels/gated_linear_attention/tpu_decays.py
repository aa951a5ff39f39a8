"""What the tokens of a chunk are to each other, inside of a TPU kernel: decays a head and decays a channel.

A query i meets a key j <= i through the decay exp(g_{j+1} + ... + g_i). Neither kind takes it from a difference of rounded sums:

* per head, a running sum has two parts: that of the log decays rounded to sixteenths, which float32 adds up without any error,
  and that of the small rests;
* per channel, pairs are split by the middle of the smallest block of 2, 4, 8, ... tokens that holds both, as :mod:`.decays`
  has it: each meets the middle through a decay of its own tokens only, at most 1, and the pairs of a level are one product.
  Where decays allow it, :mod:`.tpu_near` has fewer products.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
PART = 64  # tokens whose sums of decays a channel are one product, in two parts over 128
LOG2E = np.float32(np.log2(np.e))
# From a middle, in powers of two: as many again, and more, are left for what is multiplied by them, large or small.
NEAR = 60.0
RESET = -1024.0  # the log decay of a new document's first token: exp of it is 0 in float32; sums over a chunk stay exact in sixteenths


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices over axis ``over`` of each, in float32."""
    return jax.lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def as_wide(x: jax.Array, width: int) -> jax.Array:
    """[C,128] with equal lanes -> [C,width], with no register moved."""
    return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x


class Decays(NamedTuple):
    """Of one head of a chunk, all float32; those [C,128] have a token's value in all lanes.

    between: [C,C], exp(c_i - c_j) for j <= i, else 0.
    since_start: [C,128], exp(c_i).
    until_end: [C,128], exp(c_C - c_j); across: [1,C], the same as a row.
    total: [1,1], exp(c_C).
    """

    between: jax.Array
    since_start: jax.Array
    until_end: jax.Array
    across: jax.Array
    total: jax.Array


def running_sums(log_decay: jax.Array, tokens: int) -> jax.Array:
    """log_decay [B,HV/G,G,T] -> [B,HV/G,2G,T]: the sums from a chunk's start up to and with each token, coarse and fine parts."""
    coarse = jnp.round(log_decay * 16) / 16
    parts = jnp.concatenate([coarse, log_decay - coarse], axis=2)
    chunks = parts.reshape(*parts.shape[:3], -1, tokens)
    upper = jnp.triu(jnp.ones((tokens, tokens), jnp.float32))
    return jnp.einsum("bhgnt,ti->bhgni", chunks, upper, precision=jax.lax.Precision.HIGHEST).reshape(parts.shape)


def per_head(sums: jax.Array, head: int) -> Decays:
    """The decays of a head by the :func:`running_sums` [2G,C] of a chunk."""
    G, C = sums.shape[0] // 2, sums.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    columns = sums.T  # [C,2G], for all heads the same
    coarse_j, fine_j = sums[head : head + 1], sums[G + head : G + head + 1]
    coarse_i, fine_i = (jnp.broadcast_to(columns[:, g : g + 1], (C, LANES)) for g in (head, G + head))
    coarse_end, fine_end = coarse_j[:, C - 1 :], fine_j[:, C - 1 :]
    log_between = (as_wide(coarse_i, C) - coarse_j) + (as_wide(fine_i, C) - fine_j)
    return Decays(
        between=jnp.exp(jnp.where(i >= j, log_between, -jnp.inf)),
        since_start=jnp.exp(coarse_i + fine_i),
        until_end=jnp.exp((coarse_end - coarse_i) + (fine_end - fine_i)),
        across=jnp.exp((coarse_end - coarse_j) + (fine_end - fine_j)),
        total=jnp.exp(coarse_end + fine_end),
    )


class ChannelDecays(NamedTuple):
    """Of one head of a chunk, all [C,K] float32.

    through: exp(g_i), of each token alone.
    to_middle: for halves of s = 2, 4, ..., C/2 tokens, the decay from after token j of a block's first half to the middle, or from
        the middle to after token i of its second half.
    since_start: the decay from before the chunk to after token i. until_end: from after token j to the chunk's end.
    """

    through: jax.Array
    to_middle: dict[int, jax.Array]
    since_start: jax.Array
    until_end: jax.Array

    @property
    def total(self) -> jax.Array:
        """[1,K], the decay of the whole chunk."""
        return self.since_start[-1:]

    def scores(self, rows: list[jax.Array], k: jax.Array, dtype) -> Generator[None, None, list[jax.Array]]:
        """For each of ``rows``, [C,K] float32 as k is: rows_i . (k_j decayed from j to i), 0 where j > i, [C,C].

        A generator that yields between levels, for :mod:`.tpu_stages`, and returns the scores. Products take operands in ``dtype``.
        """
        return _scores(rows, k, self, dtype)

    def gradients(self, d_scores: list[jax.Array], rows: list[jax.Array], k: jax.Array, dtype) -> "Generator[None, None, Gradients]":
        """A generator that returns what the gradients [C,C] of :meth:`scores` make of ``rows`` and k."""
        return _gradients(d_scores, rows, k, self, dtype)


class Gradients(NamedTuple):
    """Of scores, by the ``rows`` and the k that they are of.

    rows: [C,K] each. k: [C,K]. itself: [C,1], by the first row's score with its own token's key, where that is not in the others.
    met, met_k: ``rows`` and k as they were in the products, but for decays: by these a pair adds the same to both sides of a log decay's
    gradient, the one that reads and the one that is read.
    """

    rows: list[jax.Array]
    k: jax.Array
    itself: jax.Array | None
    met: list[jax.Array]
    met_k: jax.Array

    def with_itself(self, x: jax.Array, other: jax.Array) -> jax.Array:
        """x, the gradient by one side of the pairs, with what the pairs of a token with itself add, ``other`` the other side."""
        return x if self.itself is None else x + self.itself * other


def spans(dtype) -> jax.Array:
    """For :func:`sums`, over which tokens t of a part of the chunk a decay of token i is, [5 PART,PART].

    Zeros and ones: those to the middle of a block with halves of 2 and of 4 tokens, and, in blocks of 8, those since the start and until
    the end. Then those since the middle of the part, for :mod:`.tpu_near`: less than none before it.
    """
    i, t = np.arange(PART)[:, None], np.arange(PART)

    def inside(s, after):  # the tokens t of i's block of s tokens that are after i, or not after
        return (i // s == t // s) & ((t > i) if after else (t <= i))

    to_middle = [np.where(i & s, inside(s, False), inside(s, True)) for s in (2, 4)]
    after = t >= PART // 2
    since_middle = (after & (t <= i)) * 1 - (~after & (t > i)) * 1
    return addends(np.concatenate([*to_middle, inside(SUBLANES, False), inside(SUBLANES, True), since_middle]), dtype)


def addends(which: np.ndarray, dtype) -> jax.Array:
    """Zeros and ones, of either sign, [n,m] as :func:`sums` takes them: [n,2 m] in bfloat16, once for each part of what is added up."""
    return jnp.asarray(which if dtype == jnp.float32 else np.concatenate([which, which], axis=1), dtype)


def sums(which: jax.Array, *x: jax.Array) -> jax.Array:
    """[n,K], the sums of rows of the ``x`` [...,K] float32, one below the other, that the zeros and ones :func:`addends` choose.

    In float32 they are exact but for float32's own rounding; in bfloat16 x is taken to twice its precision.
    """
    x = jnp.concatenate(x)
    if which.dtype == jnp.float32:
        return jax.lax.dot(which, x, precision=jax.lax.Precision.HIGHEST)
    coarse = x.astype(which.dtype)
    fine = (x - coarse.astype(jnp.float32)).astype(which.dtype)
    return dot(which, jnp.concatenate([coarse, fine]))


def per_channel(log_decay: jax.Array, spans: jax.Array, heads: int) -> list[ChannelDecays]:
    """log_decay [C,heads K] float32, C a power of two, the zeros and ones of :func:`spans` -> the decays of each head.

    Two heads of 128 channels fill a matrix unit of 256 columns.
    """
    C, K = log_decay.shape[0], log_decay.shape[1] // heads
    log_decay, exp = jnp.maximum(log_decay, RESET), jnp.exp
    if spans.dtype != jnp.float32:  # one multiplication for all instead of one an exp; at -50 a step, an error of 3e-6
        log_decay, exp = log_decay * LOG2E, jnp.exp2
    through = exp(log_decay)
    parts = [exp(sums(spans, log_decay[n : n + PART])) for n in range(0, C, PART)]
    two, four, *ends = (jnp.concatenate([x[n : n + PART] for x in parts]) for n in range(0, 4 * PART, PART))
    to_middle = {2: two, 4: four}

    # Blocks inside a register took sums of log decays; larger ones are products of the halves' decays.
    since_start, until_end = ([x[n : n + SUBLANES] for n in range(0, C, SUBLANES)] for x in ends)
    while len(since_start) > 1:
        first, second = slice(0, None, 2), slice(1, None, 2)
        met = list(zip(until_end[first], since_start[second], strict=True))
        to_middle[C // len(since_start)] = jnp.concatenate([x for both in met for x in both])
        until_end = [jnp.concatenate([a * b[-1:], c]) for (a, b), c in zip(met, until_end[second], strict=True)]
        since_start = [jnp.concatenate([a, a[-1:] * b]) for a, (_, b) in zip(since_start[first], met, strict=True)]

    def of(x, head):
        return x[:, head * K : (head + 1) * K]

    return [
        ChannelDecays(of(through, n), {s: of(x, n) for s, x in to_middle.items()}, of(since_start[0], n), of(until_end[0], n))
        for n in range(heads)
    ]


def halves(first: jax.Array, second: jax.Array, s: int) -> jax.Array:
    """[C,K] whose blocks of 2 s tokens have their first half from ``first``, their second from ``second``."""
    C = first.shape[0]
    if s < SUBLANES:
        return jnp.where((jax.lax.broadcasted_iota(jnp.int32, first.shape, 0) & s) != 0, second, first)
    return jnp.concatenate([x for n in range(0, C, 2 * s) for x in (first[n : n + s], second[n + s : n + 2 * s])])


def rolled(x: jax.Array, by: int) -> jax.Array:
    """Each register of 8 tokens of [C,K] rolled ``by`` tokens."""
    return pltpu.roll(x.reshape(-1, SUBLANES, x.shape[1]), by, 1).reshape(x.shape)


def _scores(rows, k, decays, dtype):
    C = k.shape[0]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    level = jnp.where(i >= j, i ^ j, -1)  # halves of s tokens: s <= level < 2 s
    before = decays.through * rolled(k, 1)
    scores = []
    for x in rows:
        itself, last = (jnp.sum(x * y, axis=1, keepdims=True) for y in (k, before))
        scores.append(jnp.where(level == 0, itself, jnp.where(level == 1, last, 0)))
    for s in (2, 4):
        yield
        met = [(halves(k, x, s) * decays.to_middle[s]).astype(dtype) for x in rows]
        yield
        products = dot(jnp.concatenate(met), met[0], (1, 1))
        yield
        scores = [jnp.where(level >= s, products[n * C : (n + 1) * C], scores[n]) for n in range(len(rows))]
    for s in (8, 32):
        yield
        small, large = ([halves(k, x, s) * decays.to_middle[s] for x in rows] for s in (s, 2 * s))
        yield
        scores = yield from _two_levels(scores, small, large, s, dtype)
    return scores


def _two_levels(scores, small, large, s, dtype):
    """Scores [C,C] with those of the pairs that meet in the middles of blocks of 2 s tokens (``small``) and of 4 s, by one product."""
    C = scores[0].shape[0]
    queries = [x[n + s : n + 2 * s] for x in small for n in range(0, C, 2 * s)]
    queries += [x[n + 2 * s : n + 4 * s] for x in large for n in range(0, C, 4 * s)]
    # Keys stand where their columns are, but for those of the small blocks where the keys of the large blocks are.
    small, large = small[0], large[0]
    keys = [x for n in range(0, C, 4 * s) for x in (large[n : n + 2 * s], small[n + 2 * s : n + 3 * s], small[n : n + s])]
    products = dot(jnp.concatenate(queries).astype(dtype), jnp.concatenate(keys).astype(dtype), (1, 1))
    yield
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
    results = []
    for m, own in enumerate(scores):
        of_small, of_large = (products[(m + x) * C // 2 : (m + x + 1) * C // 2] for x in (0, len(scores)))
        blocks = []
        for n in range(0, C, 4 * s):
            first, second, across = of_small[n // 2 : n // 2 + s], of_small[n // 2 + s : n // 2 + 2 * s], of_large[n // 2 : n // 2 + 2 * s]
            first = pltpu.roll(first, C - 3 * s, 1)
            a, b, c, d = (own[n + x * s : n + (x + 1) * s] for x in range(4))
            # What overwrites the columns of earlier blocks is overwritten itself: those are for the larger levels, which come later.
            second = jnp.concatenate([c, jnp.where(lane < n + 3 * s, second, d)])
            blocks += [a, jnp.where(lane < n + s, first, b), jnp.where(lane < n + 2 * s, across, second)]
        results.append(jnp.concatenate(blocks))
    return results


def _gradients(d_scores, rows, k, decays, dtype):
    C = k.shape[0]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    between = i ^ j
    itself = jnp.sum(jnp.where(i == j, d_scores[0], 0), axis=1, keepdims=True)
    last = [decays.through * jnp.sum(jnp.where((between == 1) & (i > j), x, 0), axis=1, keepdims=True) for x in d_scores]
    d_scores = [jnp.where(i > j, x, x.T) for x in d_scores]  # for both tokens of a pair: i as the one that reads and as the one read
    yield
    before = rolled(k, 1)
    d_rows = [x * before for x in last]
    d_k = rolled(sum(x * y for x, y in zip(last, rows, strict=True)), 7)
    for s, to_middle in decays.to_middle.items():
        met = [(halves(k, x, s) * to_middle).astype(dtype) for x in rows]
        own = [jnp.where(between >> (s.bit_length() - 1) == 1, x, 0).astype(dtype) for x in d_scores]
        yield
        d_met = [dot(x, y) for x, y in zip(own, met, strict=True)]
        yield
        d_met = [x * to_middle for x in d_met]
        d_rows = [halves(x, x + y, s) for x, y in zip(d_rows, d_met, strict=True)]
        d_k = halves(d_k + sum(d_met), d_k, s)
        yield
    return Gradients(d_rows, d_k, itself, rows, k)
