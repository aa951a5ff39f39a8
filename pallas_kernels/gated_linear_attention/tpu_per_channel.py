"""The kernels of gated linear attention with a decay a channel. See :mod:`.tpu`; states are [V,K] here.

Forward keeps the scores as well: computing them again takes longer than reading them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.gated_linear_attention.tpu_decays import addends, channel_scores, dot, halves, per_channel, rolled, spans, sums
from pallas_kernels.gated_linear_attention.tpu_stages import run, together


def operands(plan, log_decay, dtype):
    """What the kernels take for the log decays [B,T,HV K]: these, and constants for sums of them and of their gradients."""
    tokens = np.arange(plan.tokens)
    later, before = tokens[:, None] <= tokens, tokens[:, None] > tokens
    return log_decay, spans(dtype), addends(np.concatenate([later, before], axis=1), dtype)


def _heads(plan, log_decay_ref, spans_ref, head):
    """Run the generators ``head(its number, its decays)``, the decays of two heads computed at once."""
    side, K = (2 if plan.heads % 2 == 0 else 1), log_decay_ref.shape[2] // plan.heads

    def pair(h):
        decays = per_channel(log_decay_ref[0, :, h * K : (h + side) * K], spans_ref[...], side)
        yield
        yield from together(head(h + n, decays[n]) for n in range(side))

    run(pair(h) for h in range(0, plan.heads, side))


def forward(plan, q_ref, k_ref, v_ref, log_decay_ref, spans_ref, _, initial_ref, o_ref, state_ref, *kept_refs):
    C, dtype, (V, K) = plan.tokens, v_ref.dtype, state_ref.shape[2:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    before = state_ref[0].astype(dtype)
    if kept_refs:
        states_ref, scores_ref = kept_refs
        states_ref[0, 0] = before

    def head(h, decays):
        keys, values, pairs = (slice(h * width, (h + 1) * width) for width in (K, V, C))
        q, k, v = q_ref[0, :, keys].astype(jnp.float32), k_ref[0, :, keys].astype(jnp.float32), v_ref[0, :, values]
        (scores,) = yield from channel_scores([q], k, decays, dtype)
        reads, scores = (q * decays.since_start).astype(dtype), scores.astype(dtype)
        yield
        if kept_refs:
            scores_ref[0, :, pairs] = scores
            yield
        # One product over the tokens of the chunk and the state before it.
        o = dot(jnp.concatenate([scores, reads], axis=1), jnp.concatenate([v, before[h].T]))
        yield
        o_ref[0, :, values] = (plan.scale * o).astype(dtype)
        yield
        written = dot(v, (k * decays.until_end).astype(dtype), (0, 0))
        yield
        state_ref[0, h] = decays.total * state_ref[0, h] + written

    _heads(plan, log_decay_ref, spans_ref, head)


def backward(
    plan, q_ref, k_ref, v_ref, log_decay_ref, spans_ref, addends_ref, states_ref, scores_ref, d_o_ref, d_final_ref,
    d_q_ref, d_k_ref, d_v_ref, d_decay_ref, d_state_ref,
):  # fmt: skip
    C, dtype, (V, K) = plan.tokens, v_ref.dtype, d_state_ref.shape[2:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state_ref[...] = d_final_ref[...]

    def head(h, decays):
        keys, values, pairs = (slice(h * width, (h + 1) * width) for width in (K, V, C))
        q, k, v = q_ref[0, :, keys].astype(jnp.float32), k_ref[0, :, keys].astype(jnp.float32), v_ref[0, :, values]
        d_o = (plan.scale * d_o_ref[0, :, values]).astype(dtype)
        d_scores = dot(d_o, v, (1, 1))
        yield
        itself, d_q, d_k = yield from _pairs(d_scores, q, k, decays, dtype)
        yield

        d_next = d_state_ref[0, h]
        d_operand = d_next.astype(dtype)
        d_q = d_q + decays.since_start * dot(d_o, states_ref[0, 0, h])
        from_writes = decays.until_end * dot(v, d_operand)
        yield
        # Of the log decay of token t: the pairs j < t <= i, the reads of the state from t on, the writes to it before t, and the state.
        # Pairs on one side of t are in both sums of their difference. A token with itself is in neither: it has no decay.
        d_decay = sums(addends_ref[...], q * d_q - k * d_k, k * from_writes)
        yield
        d_decay_ref[0, :, keys] = d_decay + decays.total * jnp.sum(states_ref[0, 0, h] * d_next, axis=0, keepdims=True)
        yield
        d_q_ref[0, :, keys] = (d_q + itself * k).astype(dtype)
        d_k_ref[0, :, keys] = (d_k + itself * q + from_writes).astype(dtype)
        yield
        reads, writes = ((x * decay).astype(dtype) for x, decay in ((q, decays.since_start), (k, decays.until_end)))
        # One product over the tokens of the chunk and the state after it.
        weights = jnp.concatenate([scores_ref[0, :, pairs].T, writes], axis=1)
        d_v = dot(weights, jnp.concatenate([d_o, d_operand.T]))
        read = dot(d_o, reads, (0, 0))
        yield
        d_v_ref[0, :, values] = d_v.astype(dtype)
        d_state_ref[0, h] = decays.total * d_next + read

    _heads(plan, log_decay_ref, spans_ref, head)


def _pairs(d_scores, q, k, decays, dtype):
    """A generator that returns the derivatives [C,1] by each token's score with itself, and [C,K] by q and k through the other pairs."""
    C = d_scores.shape[0]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    between = i ^ j
    itself, last = (jnp.sum(jnp.where(x, d_scores, 0), axis=1, keepdims=True) for x in (i == j, (between == 1) & (i > j)))
    d_scores = jnp.where(i > j, d_scores, d_scores.T)  # for both tokens of a pair: i as the query and j as the query
    yield
    last = last * decays.through
    d_q, d_k = last * rolled(k, 1), rolled(last * q, 7)
    for s, to_middle in decays.to_middle.items():
        met = (halves(k, q, s) * to_middle).astype(dtype)
        own = jnp.where(between >> (s.bit_length() - 1) == 1, d_scores, 0).astype(dtype)
        yield
        d_met = dot(own, met)
        yield
        d_met = d_met * to_middle
        d_q, d_k = halves(d_q, d_q + d_met, s), halves(d_k + d_met, d_k, s)
        yield
    return itself, d_q, d_k
