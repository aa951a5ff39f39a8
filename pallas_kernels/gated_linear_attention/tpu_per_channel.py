"""The kernels of gated linear attention with a decay a channel. See :mod:`.tpu`; states are [V,K] here."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.gated_linear_attention.tpu_decays import dot, level_of_pairs, per_channel, spans, sums


def operands(plan, log_decay, dtype):
    """What the kernels take for the log decays [B,T,HV K], and the blocks of it: these, and constants for sums of them [7 C,C]."""
    tokens = np.arange(plan.tokens)
    before = tokens[:, None] > tokens
    constants = jnp.asarray(np.concatenate([spans(plan.tokens), before, ~before]), dtype)
    return log_decay, constants


def _met(q, k, to_middle, s, dtype):
    """Queries in second halves and keys in first halves of blocks of 2 s tokens, each come to the middle of its block."""
    second = (jax.lax.broadcasted_iota(jnp.int32, q.shape, 0) & s) != 0
    return (jnp.where(second, q, k) * to_middle).astype(dtype)


def forward(plan, q_ref, k_ref, v_ref, log_decay_ref, spans_ref, initial_ref, o_ref, state_ref, states_ref):
    n = pl.program_id(2)
    C, dtype, (V, K) = plan.tokens, v_ref.dtype, state_ref.shape[2:]

    @pl.when(n == 0)
    def _():
        state_ref[...] = initial_ref[...]

    states_ref[0, 0] = state_ref[0].astype(dtype)
    level = level_of_pairs(C)
    for h in range(plan.heads):
        keys, values = (slice(h * width, (h + 1) * width) for width in (K, V))
        q, k, v = q_ref[0, :, keys].astype(jnp.float32), k_ref[0, :, keys].astype(jnp.float32), v_ref[0, :, values]
        decays = per_channel(log_decay_ref[0, :, keys], spans_ref[: 5 * C])
        scores = jnp.where(level == 0, dot(q_ref[0, :, keys], k_ref[0, :, keys], (1, 1)), 0)
        for power, to_middle in enumerate(decays.to_middle):
            met = _met(q, k, to_middle, 2**power, dtype)
            scores = jnp.where(level >= 2**power, dot(met, met, (1, 1)), scores)
        read = dot((q * decays.since_start).astype(dtype), states_ref[0, 0, h], (1, 1))
        o_ref[0, :, values] = (plan.scale * (dot(scores.astype(dtype), v) + read)).astype(dtype)
        written = dot(v, (k * decays.until_end).astype(dtype), (0, 0))
        state_ref[0, h] = decays.since_start[C - 1 :] * state_ref[0, h] + written


def backward(
    plan, q_ref, k_ref, v_ref, log_decay_ref, spans_ref, states_ref, d_o_ref, d_final_ref,
    d_q_ref, d_k_ref, d_v_ref, d_decay_ref, d_state_ref,
):
    n = pl.program_id(2)
    C, dtype, (V, K) = plan.tokens, v_ref.dtype, d_state_ref.shape[2:]

    @pl.when(n == 0)
    def _():
        d_state_ref[...] = d_final_ref[...]

    level = level_of_pairs(C)
    i, t = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    second_of = jax.lax.broadcasted_iota(jnp.int32, (C, K), 0)
    for h in range(plan.heads):
        keys, values = (slice(h * width, (h + 1) * width) for width in (K, V))
        q, k, v = q_ref[0, :, keys].astype(jnp.float32), k_ref[0, :, keys].astype(jnp.float32), v_ref[0, :, values]
        d_o = (plan.scale * d_o_ref[0, :, values]).astype(dtype)
        decays = per_channel(log_decay_ref[0, :, keys], spans_ref[: 5 * C])
        d_next = d_state_ref[0, h]
        reads, writes = q * decays.since_start, k * decays.until_end
        d_reads, d_writes = dot(d_o, states_ref[0, 0, h]), dot(v, d_next.astype(dtype))
        from_reads, from_writes = reads * d_reads, writes * d_writes

        # The derivatives of pairs, for both of a pair: i as the query and j as the query.
        d_scores = jnp.where(i >= t, dot(d_o, v, (1, 1)), dot(v, d_o, (1, 1)))
        scores = jnp.where(level == 0, dot(q_ref[0, :, keys], k_ref[0, :, keys], (1, 1)), 0)
        d_q, d_k = jnp.zeros_like(q), jnp.zeros_like(k)
        for power, to_middle in enumerate(decays.to_middle):
            s = 2**power
            met = _met(q, k, to_middle, s, dtype)
            scores = jnp.where(level >= s, dot(met, met, (1, 1)), scores)
            d_met = to_middle * dot(jnp.where((i ^ t) >> power == 1, d_scores, 0).astype(dtype), met)
            second = (second_of & s) != 0
            d_q, d_k = d_q + jnp.where(second, d_met, 0), d_k + jnp.where(second, 0, d_met)

        # Of the log decay of token t: the pairs j < t <= i, the reads of the state from t on, the writes to it before t, and the state.
        before, after = spans_ref[5 * C : 6 * C], spans_ref[6 * C :]
        d_decay = sums(after, q * d_q - k * d_k + from_reads) + sums(before, from_writes)
        kept = decays.since_start[C - 1 :] * jnp.sum(states_ref[0, 0, h] * d_next, axis=0, keepdims=True)
        d_decay_ref[0, :, keys] = d_decay + kept

        itself = jnp.where(i == t, d_scores, 0).astype(dtype)
        d_q_ref[0, :, keys] = (d_q + dot(itself, k_ref[0, :, keys]) + decays.since_start * d_reads).astype(dtype)
        d_k_ref[0, :, keys] = (d_k + dot(itself, q_ref[0, :, keys]) + decays.until_end * d_writes).astype(dtype)
        d_v = dot(scores.astype(dtype), d_o, (0, 0)) + dot(writes.astype(dtype), d_next.astype(dtype), (1, 1))
        d_v_ref[0, :, values] = d_v.astype(dtype)
        d_state_ref[0, h] = decays.since_start[C - 1 :] * d_next + dot(d_o, reads.astype(dtype), (0, 0))
