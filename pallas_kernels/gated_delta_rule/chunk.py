"""The gated delta rule over one chunk of C tokens at a time: what every chunked implementation computes.

Inside a chunk that starts from the state S, with E_ij = exp(g_{j+1} + ... + g_i) the decay from token j to token i,
the rank-one updates obey a unit lower triangular system (the WY, or UT, form of the delta rule):

    u_i = beta_i v_i - beta_i (E_i0 k_i)^T S - sum_{j<i} A_ij u_j        A_ij = beta_i k_i^T E_ij k_j
    o_i = scale ((E_i0 q_i)^T S + sum_{j<=i} (q_i^T E_ij k_j) u_j)       S' = E_C0 S + sum_j (E_Cj k_j) u_j^T

fla forms W = (I + A)^-1 beta K and U = (I + A)^-1 beta V and then u = U - W S. Here the inverse is applied once, to
beta V - beta K S: a tenth fewer FLOPs, half of the backward pass's operands, and nothing is rounded in between.

Arrays are [G,...] with G = B HV, one row a head: XLA on CPU reduces and multiplies rank-3 arrays up to 15 times faster than rank-4 ones.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_delta_rule import triangular


class Span(NamedTuple):
    """The documents of a chunk's tokens, numbered as in ``segments.Segments``."""

    index: jax.Array  # [B,C]
    real: jax.Array  # [B,C] bool
    before: jax.Array  # [B], the document of the token before the chunk


class Chunk(NamedTuple):
    """One chunk as the state meets it. The first C of 2C rows are those of the queries, the others those of the keys.

    reads: [G,2C,K]  scale E_i0 q_i, then beta_i E_i0 k_i
    scores: [G,2C,C]  scale q_i^T E_ij k_j for j <= i, then A_ij for j < i; 0 elsewhere
    writes: [G,C,K]  E_Cj k_j
    values: [G,C,V]  beta_j v_j
    keep: E_C0, [G,K,1] or [G,1,1]; None where it is 1
    """

    reads: jax.Array
    scores: jax.Array
    writes: jax.Array
    values: jax.Array
    keep: jax.Array | None


def head_rows(x: jax.Array) -> jax.Array:
    """[B,C,H,...] -> [B*H,C,...]."""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(-1, *x.shape[2:])


def token_rows(x: jax.Array, B: int) -> jax.Array:
    """[B*H,C,...] -> [B,C,H,...], the inverse of :func:`head_rows`."""
    return jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 2)


def select_real(x: jax.Array, span: Span | None) -> jax.Array:
    """``x`` [B,C,...] with 0 in place of whatever padding holds."""
    return x if span is None else jnp.where(span.real.reshape(span.real.shape + (1,) * (x.ndim - 2)), x, 0)


def prepare(q, k, v, beta, log_decay, span: Span | None, scale: float, dtype) -> Chunk:
    """q, k [B,C,H,K]   v [B,C,HV,V]   beta [B,C,HV]   log_decay None | [B,C,HV] | [B,C,HV,K] -> Chunk, computed in ``dtype``."""
    C, groups = q.shape[1], v.shape[2] // q.shape[2]

    def rows_of(x, repeats=1):
        x = select_real(x, span).astype(dtype)
        return head_rows(jnp.repeat(x, repeats, axis=2) if repeats > 1 else x)

    q, k, v, beta = rows_of(q, groups), rows_of(k, groups), rows_of(v), rows_of(beta)[..., None]
    # Without the barrier XLA merges this transposition, of whole rows, with that in k's products, of single elements.
    k = jax.lax.optimization_barrier(k)
    rows = jnp.concatenate([scale * q, beta * k], axis=1)
    joint, reached, lasting, kept = _masks(C, span, v.shape[0])
    if log_decay is None:
        scores = jnp.where(joint, _products(rows, k), 0)
        if span is None:
            return Chunk(rows, scores, k, beta * v, None)
        rows = jnp.where(jnp.concatenate([reached, reached], axis=1), rows, 0)
        return Chunk(rows, scores, jnp.where(lasting, k, 0), beta * v, kept.astype(dtype))

    log_decay = rows_of(log_decay)
    per_head = log_decay.ndim == 2
    scores, from_start, to_end, total = (_decayed_per_head if per_head else _decayed_per_channel)(rows, k, log_decay)
    from_start, to_end, total = jnp.exp(from_start), jnp.exp(to_end), jnp.exp(total)
    scores = jnp.where(joint, scores, 0)
    if span is not None:
        from_start, to_end, total = jnp.where(reached, from_start, 0), jnp.where(lasting, to_end, 0), jnp.where(kept, total, 0)
    return Chunk(rows * jnp.concatenate([from_start, from_start], axis=1), scores, k * to_end, beta * v, jnp.swapaxes(total, 1, 2))


def _masks(C: int, span: Span | None, G: int):
    """Which pairs of rows and tokens meet ([2C,C] or [G,2C,C]), which tokens the incoming state reaches and which last to the end
    (each [G,C,1]), and whether the state passes the whole chunk ([G,1,1]); the latter three None where all do."""
    i, j = np.arange(C)[:, None], np.arange(C)
    causal = np.concatenate([i >= j, i > j])
    if span is None:
        return causal, None, None, None
    repeats = G // span.index.shape[0]
    index, before = jnp.repeat(span.index, repeats, axis=0), jnp.repeat(span.before, repeats)[:, None]
    same = index[:, :, None] == index[:, None, :]
    joint = causal & jnp.concatenate([same, same], axis=1)
    last = index[:, -1:]
    return joint, (index == before)[..., None], (index == last)[..., None], (before == last)[..., None]


def _products(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("gik,gjk->gij", x, y)


def _decayed_per_head(rows, k, log_decay):
    """Scores [G,2C,C] with decays g [G,C]; and the sums of g from the chunk's start to a token, from it to the end, and in all.

    The sum over j < t <= i is a product with a triangle of ones for every i: all its terms have one sign, so it is accurate to
    rounding, which a difference of two long cumulative sums is not. So is its gradient, which adds up the pairs around t.
    """
    C = log_decay.shape[1]
    i, j = np.arange(C)[:, None], np.arange(C)
    until = jnp.where(i >= j, log_decay[:, None, :], 0)
    after = jnp.asarray(i > j, log_decay.dtype)
    sums = jnp.einsum("git,tj->gij", until, after, precision=jax.lax.Precision.HIGHEST)
    decay = jnp.exp(jnp.where(i >= j, sums, -jnp.inf))
    from_start = sums[:, :, :1] + log_decay[:, :1, None]
    scores = _products(rows, k) * jnp.concatenate([decay, decay], axis=1)
    return scores, from_start, sums[:, -1, :, None], from_start[:, -1:]


def _decayed_per_channel(rows, k, log_decay):
    """The same with decays g [G,C,K], by halves: in a block of 2s tokens the later s read the earlier s through the boundary n,

        sum_d x_id k_jd E_ijd = (x_i exp(g_n + ... + g_i)) . (k_j exp(g_{j+1} + ... + g_{n-1}))

    so no exponent is ever positive, every sum runs over neighbouring tokens alone, and all but the diagonal is matrix products.
    """
    C = k.shape[1]
    halves, from_start, to_end = _sums_by_halves(log_decay)
    diagonal = jnp.sum(rows[:, :C] * k, axis=2).reshape(-1, 1, 1)
    reads, updates = diagonal, jnp.zeros_like(diagonal)  # the scores of queries and of keys: [G*blocks,size,size]
    for early, late in halves:
        size = early.shape[1]
        early, late = jnp.exp(early), jnp.exp(late)
        readers = jnp.concatenate([_half(rows[:, :C], size, 1) * late, _half(rows[:, C:], size, 1) * late], axis=1)
        joined = _products(readers, _half(k, size, 0) * early)
        reads, updates = _joined(reads, joined[:, :size]), _joined(updates, joined[:, size:])
    return jnp.concatenate([reads, updates], axis=1), from_start, to_end, from_start[:, -1:]


def _half(x: jax.Array, size: int, which: int) -> jax.Array:
    """[G,C,K] -> [G*blocks,size,K]: of every block of 2 * ``size`` rows the early (0) or the late (1) half."""
    return x.reshape(-1, 2, size, x.shape[-1])[:, which]


def _sums_by_halves(log_decay: jax.Array):
    """Sums of g [G,C,K]: for s = 1, 2, ..., C/2 those (early, late) of :func:`_decayed_per_channel`, each [G*blocks,s,K]; and
    from the chunk's start to a token and from it to the end, [G,C,K].

    Products with triangles of ones inside blocks of 16 tokens, then sums of whole blocks: a fifth of the work of C x C triangles.
    """
    G, C, K = log_decay.shape
    block, blocks = triangular.BLOCK, C // triangular.BLOCK
    inside = _add(_intervals(block, 1), log_decay.reshape(G * blocks, block, K))
    *small, from_start, to_end = jnp.split(inside, inside.shape[1] // block, axis=1)
    halves = [(_half(x, 1 << level, 0), _half(x, 1 << level, 1)) for level, x in enumerate(small)]
    if blocks > 1:
        between = _add(_intervals(blocks, 0), from_start[:, -1].reshape(G, blocks, K))
        *large, before, after = (x.reshape(G * blocks, 1, K) for x in jnp.split(between, between.shape[1] // blocks, axis=1))
        for level, x in enumerate(large):
            size = block << level
            halves.append((_half((to_end + x).reshape(G, C, K), size, 0), _half((from_start + x).reshape(G, C, K), size, 1)))
        from_start, to_end = from_start + before, to_end + after
    return halves, from_start.reshape(G, C, K), to_end.reshape(G, C, K)


def _add(intervals: np.ndarray, x: jax.Array) -> jax.Array:
    ones = jnp.broadcast_to(jnp.asarray(intervals, x.dtype), (x.shape[0], *intervals.shape))
    return jnp.einsum("git,gtk->gik", ones, x, precision=jax.lax.Precision.HIGHEST)


def _intervals(n: int, own: int) -> np.ndarray:
    """[(log2(n)+2)*n,n] of 0 and 1: the places t that a sum for place i runs over. For halves of 1, 2, ..., n/2 places, from the
    boundary to i where i is late, with ``own`` = 1 with i itself, and from behind i to the boundary where it is early; then all
    up to i, likewise, and all behind i."""
    i, t = np.arange(n)[:, None], np.arange(n)
    intervals = []
    for level in range(n.bit_length() - 1):
        boundary = (i >> (level + 1) << (level + 1)) + (1 << level)
        intervals.append(np.where(i >= boundary, (t >= boundary) & (t < i + own), (t > i) & (t < boundary)))
    return np.concatenate([*intervals, t < i + own, t > i])


def _joined(diagonal: jax.Array, below: jax.Array) -> jax.Array:
    """Lower triangular blocks [2n,s,s] on the diagonal and [n,s,s] below it, as [n,2s,2s]."""
    diagonal = diagonal.reshape(-1, 2, *diagonal.shape[1:])
    early = jnp.concatenate([diagonal[:, 0], jnp.zeros_like(below)], axis=2)
    return jnp.concatenate([early, jnp.concatenate([below, diagonal[:, 1]], axis=2)], axis=1)


class Solution(NamedTuple):
    """What the triangular system of a chunk gave, kept for the backward pass: a tenth of its work not done twice.

    updates: [G,C,V]  u_i
    inverse: [G,C,C]  (I + A)^-1
    """

    updates: jax.Array
    inverse: jax.Array


def forward(chunk: Chunk, state: jax.Array) -> tuple[jax.Array, jax.Array, Solution]:
    """Outputs [G,C,V] and the next state of one chunk that starts from ``state`` [G,K,V]; and what was solved on the way."""
    C = chunk.writes.shape[1]
    met = jnp.einsum("gik,gkv->giv", chunk.reads, state)
    inverse = triangular.inverse(chunk.scores[:, C:])
    updates = jnp.einsum("gij,gjv->giv", inverse, chunk.values - met[:, C:])
    output = met[:, :C] + jnp.einsum("gij,gjv->giv", chunk.scores[:, :C], updates)
    next_state = _decayed(state, chunk.keep) + jnp.einsum("gjk,gjv->gkv", chunk.writes, updates)
    return output, next_state, Solution(updates, inverse)


def backward(chunk: Chunk, state: jax.Array, solution: Solution, d_output: jax.Array, d_next: jax.Array) -> tuple[Chunk, jax.Array]:
    """The gradients of :func:`forward` with respect to the chunk and to ``state``."""
    C = chunk.writes.shape[1]
    updates, inverse = solution
    d_updates = jnp.einsum("gij,giv->gjv", chunk.scores[:, :C], d_output) + jnp.einsum("gjk,gkv->gjv", chunk.writes, d_next)
    d_values = jnp.einsum("gij,giv->gjv", inverse, d_updates)
    d_met = jnp.concatenate([d_output, -d_values], axis=1)
    d_chunk = Chunk(
        reads=jnp.einsum("giv,gkv->gik", d_met, state),
        scores=jnp.einsum("giv,gjv->gij", d_met, updates),
        writes=jnp.einsum("gjv,gkv->gjk", updates, d_next),
        values=d_values,
        keep=_d_keep(chunk.keep, state, d_next),
    )
    # One product over 2C rows would be the same; on CPU two over C each were measured a third faster.
    d_state = jnp.einsum("gik,giv->gkv", chunk.reads[:, :C], d_output) - jnp.einsum("gik,giv->gkv", chunk.reads[:, C:], d_values)
    return d_chunk, _decayed(d_next, chunk.keep) + d_state


def _decayed(state: jax.Array, keep: jax.Array | None) -> jax.Array:
    return state if keep is None else state * keep


def _d_keep(keep: jax.Array | None, state: jax.Array, d_next: jax.Array) -> jax.Array | None:
    if keep is None:
        return None
    return jnp.sum(state * d_next, axis=2 if keep.shape[1] > 1 else (1, 2), keepdims=True)
