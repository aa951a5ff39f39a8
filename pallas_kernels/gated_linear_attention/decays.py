"""What the tokens of a chunk are to each other: scores and decays, for both kinds of log decay.

A query i meets a key j <= i through the decay exp(g_{j+1} + ... + g_i). Differences of running sums lose it where a strong
decay comes before a weak one, and exp(-running sum) overflows; so each such sum is taken over nothing but its own tokens:

* per head, it is one number a pair: all of them are a product of two triangular matrices;
* per channel, pairs are split by the middle of the smallest block of 2, 4, 8, ... tokens that holds both. The decay is then
  that from j to the middle times that from the middle to i, both at most 1, and all pairs of a level are one matmul.

Either is as exact for a log decay of -50 a step, or of -inf, as for none, and so is its derivative.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORGOTTEN = -1024.0  # a log decay whose exp is 0, in float64 too, as is that of all below, -inf among them


class Decayed(NamedTuple):
    """Of chunks [...]: one decay a channel, or one in all, hence K or 1.

    scores: [...,C,C], q_i . (k_j decayed from j to i), 0 where j > i.
    since_start: [...,C,K|1], the decay from before the chunk to after token i.
    until_end: [...,C,K|1], the decay from after token j to the chunk's end.
    """

    scores: jax.Array
    since_start: jax.Array
    until_end: jax.Array


def per_head(q: jax.Array, k: jax.Array, log_decay: jax.Array) -> Decayed:
    """q, k [...,C,K]; log_decay [...,C], or [...,1] where all tokens of the chunk have the same."""
    C = q.shape[-2]
    # Of -inf, the products below would make nan where it is no addend: 0 times it.
    log_decay = jnp.broadcast_to(jnp.maximum(log_decay, FORGOTTEN), (*log_decay.shape[:-1], C))
    causal = np.tril(np.ones((C, C), bool))
    through, after = causal.astype(log_decay.dtype), np.tril(causal, -1).astype(log_decay.dtype)  # [i, t]: t <= i; [t, j]: j < t
    sums = jnp.einsum("it,...t,tj->...ij", through, log_decay, after, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.einsum("...ik,...jk->...ij", q, k) * jnp.exp(jnp.where(causal, sums, -jnp.inf))
    since_start = jnp.exp(sums[..., 0] + log_decay[..., :1])
    return Decayed(scores, since_start[..., None], jnp.exp(sums[..., -1, :, None]))


def per_channel(q: jax.Array, k: jax.Array, log_decay: jax.Array) -> Decayed:
    """q, k, log_decay [...,C,K], C a power of two."""
    *batch, C, K = q.shape
    decayed = _per_channel(*(x.reshape(-1, C, K) for x in (q, k, log_decay)))
    return Decayed(*(x.reshape(*batch, *x.shape[1:]) for x in decayed))


class Level(NamedTuple):
    """How tokens of a chunk meet in the middles of its blocks of 2 s tokens, s the length of a half."""

    s: int
    second: np.ndarray  # [C,1], the token is in its block's second half
    pairs: np.ndarray  # [C,C], the query i is in the second half of the block in whose first half the key j is
    crossed: np.ndarray  # [C,C], the decay of token t lies between token i and the middle


def _levels(C: int) -> list[Level]:
    i, t = np.arange(C)[:, None], np.arange(C)
    levels = []
    for s in (2**power for power in range(C.bit_length() - 1)):
        second, block, middle = i // s % 2 == 1, i // (2 * s), i // (2 * s) * 2 * s + s
        pairs = (block == block.T) & second & ~second.T
        crossed = np.where(second, (middle <= t) & (t <= i), (i < t) & (t < middle))
        levels.append(Level(s, second, pairs, crossed))
    return levels


@jax.custom_vjp
def _per_channel(q, k, log_decay):
    return _per_channel_forward(q, k, log_decay)[0]


def _per_channel_forward(q, k, log_decay):
    C, K = q.shape[1:]
    scores = jnp.where(np.eye(C, dtype=bool), jnp.einsum("gik,gjk->gij", q, k), 0)
    # Inside blocks of s tokens: the decay from the block's start through each token, and from after each token to the end.
    since_start, until_end = jnp.exp(log_decay), jnp.ones_like(log_decay)
    kept = []
    for s, second, pairs, _ in _levels(C):
        # Keys in first halves come up to the middle of their block of 2 s, queries in second halves go on from there.
        decay = jnp.where(second, since_start, until_end)
        met = jnp.where(second, q, k) * decay
        scores = jnp.where(pairs, jnp.einsum("gik,gjk->gij", met, met), scores)
        kept.append((decay, met))

        since_start, until_end = (x.reshape(-1, 2, s, K) for x in (since_start, until_end))
        first_half, second_half = since_start[:, 0, -1], since_start[:, 1, -1]
        is_second = np.array([False, True])[:, None, None]
        since_start = since_start * jnp.where(is_second, first_half[:, None, None], 1)
        until_end = until_end * jnp.where(is_second, 1, second_half[:, None, None])
        since_start, until_end = (x.reshape(-1, C, K) for x in (since_start, until_end))
    return (scores, since_start, until_end), (q, k, since_start, until_end, kept)


def _per_channel_backward(residuals, cotangents):
    q, k, since_start, until_end, kept = residuals
    d_scores, d_since_start, d_until_end = cotangents
    C = q.shape[1]
    d_self = jnp.where(np.eye(C, dtype=bool), d_scores, 0)
    d_q, d_k = jnp.einsum("gij,gjk->gik", d_self, k), jnp.einsum("gij,gjk->gik", d_self, q)

    def by_terms(d_sums, crossed):
        """Derivatives by the log decays [g,t,k] of derivatives by sums of them [g,i,k]: themselves sums, never differences of sums."""
        # One matrix for all chunks, yet batched: XLA would rather transpose d_sums through memory than loop over a shared operand.
        crossed = jnp.broadcast_to(crossed.T.astype(d_sums.dtype), (d_sums.shape[0], C, C))
        return jnp.einsum("gti,gik->gtk", crossed, d_sums, precision=jax.lax.Precision.HIGHEST)

    causal = np.tril(np.ones((C, C), bool))
    d_log_decay = by_terms(d_since_start * since_start, causal) + by_terms(d_until_end * until_end, ~causal)
    for (_, second, pairs, crossed), (decay, met) in zip(_levels(C), kept, strict=True):
        d_pairs = jnp.where(pairs, d_scores, 0)
        d_met = jnp.einsum("gij,gjk->gik", d_pairs + jnp.swapaxes(d_pairs, 1, 2), met)
        d_row = d_met * decay
        d_q, d_k = d_q + jnp.where(second, d_row, 0), d_k + jnp.where(second, 0, d_row)
        d_log_decay += by_terms(d_met * met, crossed)
    return d_q, d_k, d_log_decay


_per_channel.defvjp(_per_channel_forward, _per_channel_backward)
