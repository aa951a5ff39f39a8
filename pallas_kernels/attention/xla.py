"""Attention a block of queries against a block of keys at a time (the online softmax of FlashAttention), with its own VJP.

    m' = max(m, max_j s_j)    l' = exp(m - m') l + sum_j exp(s_j - m')    acc' = exp(m - m') acc + sum_j exp(s_j - m') v_j
    output = acc / l          logsumexp = m + log l

Blocks of keys above the diagonal, before the window and before the queries' first document are never visited, so that causal
work is about half of T^2 and that of packed documents less. The backward pass recomputes each block's weights from the
logsumexp: memory is linear in T.
"""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunks, kept
from pallas_kernels.attention.reach import Ranges, blocks_at, ranges, ranges_of_whole_rows
from pallas_kernels.attention.reference import MASKED, cached_places, query_places
from pallas_kernels.segments import Segments

BLOCK = 128


class Reach(NamedTuple):
    """What each token attends to, by blocks; ``first``, ``last`` and ``key`` as in :class:`.reach.Ranges`.

    first, last: [N,B,C] int32, of queries.
    first_block: [N] int32, the first block of keys in reach of a block of queries.
    own_block: [N] int32, the last one, where the queries themselves are.
    key: [all N,B,C] int32.
    """

    first: jax.Array
    last: jax.Array
    first_block: jax.Array
    own_block: jax.Array
    key: jax.Array

    def of_queries(self, blocks: jax.Array) -> "Reach":
        """That of some blocks of queries, among all keys."""
        return Reach(*(a[blocks] for a in self[:-1]), self.key)


def attention(q, k, v, scale, window, segments: Segments | None):
    """Blockwise attention; see api.py."""
    B, T = q.shape[:2]
    block = block_length(T)
    if segments is None:
        reach = _reach(ranges_of_whole_rows(B, T, window, -T % block), block)
    else:  # what padding holds, nan included, ends here
        reach = _reach(ranges(segments, window, -T % block), block)
        q, k, v = (jnp.where(segments.real[:, :, None, None], a, 0) for a in (q, k, v))
    return _attend_rows(scale, q, k, v, reach, block)


def attention_stretch(q, k, v, scale, window, segments: Segments, places):
    """The queries of some of equal stretches, whole blocks of :func:`block_length`, against the keys of all; see stretch.py."""
    T = q.shape[1] // len(places)
    block = block_length(T)
    reach = _reach(ranges(segments, window), block).of_queries(blocks_at(places, T // block))
    return _attend_rows(scale, q, k, v, reach, block)


def block_length(T: int) -> int:
    """Tokens a block, of T."""
    return min(BLOCK, -(-T // 8) * 8)


def _attend_rows(scale, q, k, v, reach, block):
    """[B,T,H,V] of q [B,T,H,K] and of k, v, which may be longer."""
    B, T, H, K = q.shape
    HK = k.shape[2]
    q, k, v = (chunks.split(a, block) for a in (q, k, v))
    q = q.reshape(-1, B, HK, H // HK, block, K)
    output = _attend(scale, q, k, v, reach)
    return chunks.join(output.reshape(-1, B, H, block, v.shape[-1]), T)


def attention_prefill(q, k_cache, v_cache, length, scale, window, segments: Segments | None):
    """A chunk against a cache that holds it, a block of the cache at a time, as many as are filled; see api.py."""
    B, T, H, K = q.shape
    HK, S = k_cache.shape[1:3]
    block = min(BLOCK, S)
    end = (0, -S % block)
    places = jnp.pad(cached_places(length, S), [(0, 0), end], constant_values=-1)[:, None]
    k_cache, v_cache = (jnp.pad(a, [(0, 0), (0, 0), end, (0, 0)]) for a in (k_cache, v_cache))
    own = query_places(length, segments, B, T)[:, :, None]
    q = q.reshape(B, T, HK, H // HK, K)
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def keys(j, carry):
        m, total, acc = carry
        k, v, place = (jax.lax.dynamic_slice_in_dim(a, j * block, block, axis=2) for a in (k_cache, v_cache, places))
        allowed = (place >= 0) & (place <= own)
        if window is not None:
            allowed &= own - place < window
        allowed = allowed[:, None, None]
        scores = scale * _matmul("bthgk,bhsk->bhgts", q, k.astype(q.dtype))
        m_next = jnp.maximum(m, jnp.max(jnp.where(allowed, scores, MASKED), axis=-1))
        weights = jnp.exp(jnp.where(allowed, scores - m_next[..., None], MASKED))
        decay = jnp.exp(m - m_next)
        total = decay * total + jnp.sum(weights, axis=-1)
        acc = decay[..., None] * acc + _matmul("bhgts,bhsv->bhgtv", weights.astype(v.dtype), v)
        return m_next, total, acc

    rows = (B, HK, H // HK, T)
    start = jnp.full(rows, MASKED, dtype), jnp.zeros(rows, dtype), jnp.zeros((*rows, v_cache.shape[-1]), dtype)
    filled = -(-jnp.minimum(jnp.max(length), S) // block)
    _, total, acc = jax.lax.fori_loop(0, filled, keys, start)
    output = acc / jnp.where(total > 0, total, 1)[..., None]  # padding attends to nothing
    return jnp.moveaxis(output, 3, 1).reshape(B, T, H, -1)


def _reach(tokens: Ranges, block) -> Reach:
    rank, first, last, key = (a.reshape(len(a), -1, block).swapaxes(0, 1) for a in tokens)
    # Neither first nor rank ever falls along a row: the last key of a block and the first query of a block decide.
    reached = jnp.any(rank[:, :, -1] >= first[:, None, :, 0], axis=2)  # [N queries, N keys]
    return Reach(first, last, jnp.sum(~reached, axis=1, dtype=jnp.int32), jnp.arange(len(key), dtype=jnp.int32), key)


def _allowed(reach: Reach, i, j):
    """[B,1,1,C,C] bool: which keys of block j a query of block i attends to."""
    key = reach.key[j][:, None, :]
    return ((reach.first[i][:, :, None] <= key) & (key <= reach.last[i][:, :, None]))[:, None, None]


def _matmul(equation, a, b):
    """einsum of operands in one dtype, summed in float32 at least."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(b.dtype, jnp.float32))


def _blocks_forward(scale, q, k, v, reach):
    """(output [N,B,HK,G,C,V], logsumexp [N,B,HK,G,C])."""
    N, *rows, K = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def queries(_, i):
        def keys(j, carry):
            m, total, acc = carry
            allowed = _allowed(reach, i, j)
            scores = scale * _matmul("bhgik,bhjk->bhgij", q[i], k[j])
            m_next = jnp.maximum(m, jnp.max(jnp.where(allowed, scores, MASKED), axis=-1))
            weights = jnp.exp(jnp.where(allowed, scores - m_next[..., None], MASKED))
            decay = jnp.exp(m - m_next)
            total = decay * total + jnp.sum(weights, axis=-1)
            acc = decay[..., None] * acc + _matmul("bhgij,bhjv->bhgiv", weights.astype(v.dtype), v[j])
            return m_next, total, acc

        start = jnp.full(rows, MASKED, dtype), jnp.zeros(rows, dtype), jnp.zeros((*rows, v.shape[-1]), dtype)
        m, total, acc = jax.lax.fori_loop(reach.first_block[i], reach.own_block[i] + 1, keys, start)
        total = jnp.where(total > 0, total, 1)  # padding attends to nothing
        return None, ((acc / total[..., None]).astype(v.dtype), m + jnp.log(total))

    return jax.lax.scan(queries, None, jnp.arange(N, dtype=jnp.int32))[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, reach):
    """Blocks q [N,B,HK,G,C,K], k [all N,B,HK,C,K], v [all N,B,HK,C,V] -> [N,B,HK,G,C,V] in v's dtype."""
    return _blocks_forward(scale, q, k, v, reach)[0]


def _attend_forward(scale, q, k, v, reach):
    output, logsumexp = _blocks_forward(scale, q, k, v, reach)
    output, logsumexp = kept.of_attention(output, logsumexp)
    return output, (q, k, v, reach, output, logsumexp)


def _attend_backward(scale, residuals, doutput):
    q, k, v, reach, output, logsumexp = residuals
    dtype = logsumexp.dtype
    # d softmax: dscores = weights * (dweights - sum_j weights_j dweights_j), and that sum is output . doutput
    mean = jnp.sum(output.astype(dtype) * doutput.astype(dtype), axis=-1)

    def queries(carry, i):
        def keys(j, carry):
            dq, dk, dv = carry
            scores = scale * _matmul("bhgik,bhjk->bhgij", q[i], k[j])
            weights = jnp.exp(jnp.where(_allowed(reach, i, j), scores - logsumexp[i][..., None], MASKED))
            dweights = _matmul("bhgiv,bhjv->bhgij", doutput[i], v[j])
            dscores = (scale * weights * (dweights - mean[i][..., None])).astype(q.dtype)
            dq = dq + _matmul("bhgij,bhjk->bhgik", dscores, k[j])
            dk = dk.at[j].add(_matmul("bhgij,bhgik->bhjk", dscores, q[i]))
            dv = dv.at[j].add(_matmul("bhgij,bhgiv->bhjv", weights.astype(doutput.dtype), doutput[i]))
            return dq, dk, dv

        dq, dk, dv = jax.lax.fori_loop(reach.first_block[i], reach.own_block[i] + 1, keys, (jnp.zeros(q.shape[1:], dtype), *carry))
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
    (dk, dv), dq = jax.lax.scan(queries, zeros, jnp.arange(len(q), dtype=jnp.int32))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
