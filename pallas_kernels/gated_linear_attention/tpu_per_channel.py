"""The kernels of gated linear attention with a decay a channel. See :mod:`.tpu`; states are [V,K] here.

Forward keeps the scores as well: computing them again takes longer than reading them. How decays get there is chosen as the kernels run, a
step of the grid at a time: see :mod:`.tpu_heads`.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_linear_attention.tpu_decays import dot, sums
from pallas_kernels.gated_linear_attention.tpu_heads import by_heads, constants


def operands(plan, log_decay, dtype):
    """What the kernels take for the log decays [B,T,HV K]."""
    return log_decay, *constants(plan.tokens, dtype)


def forward(plan, q_ref, k_ref, v_ref, log_decay_ref, spans_ref, _, initial_ref, o_ref, state_ref, *kept_refs):
    C, dtype, (V, K) = plan.tokens, v_ref.dtype, state_ref.shape[2:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    def head(h, decays):
        keys, values, pairs = (slice(h * width, (h + 1) * width) for width in (K, V, C))
        q, k, v = q_ref[0, :, keys].astype(jnp.float32), k_ref[0, :, keys].astype(jnp.float32), v_ref[0, :, values]
        (scores,) = yield from decays.scores([q], k, dtype)
        reads, scores = (q * decays.since_start).astype(dtype), scores.astype(dtype)
        yield
        before = state_ref[0, h].astype(dtype)
        if kept_refs:
            states_ref, scores_ref = kept_refs
            states_ref[0, 0, h], scores_ref[0, :, pairs] = before, scores
            yield
        # One product over the tokens of the chunk and the state before it.
        o = dot(jnp.concatenate([scores, reads], axis=1), jnp.concatenate([v, before.T]))
        yield
        o_ref[0, :, values] = (plan.scale * o).astype(dtype)
        yield
        written = dot(v, (k * decays.until_end).astype(dtype), (0, 0))
        yield
        state_ref[0, h] = decays.total * state_ref[0, h] + written

    by_heads(plan.heads, log_decay_ref, spans_ref, head)


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
        by_pairs = yield from decays.gradients([d_scores], [q], k, dtype)
        yield

        d_next = d_state_ref[0, h]
        d_operand = d_next.astype(dtype)
        d_q = by_pairs.rows[0] + decays.since_start * dot(d_o, states_ref[0, 0, h])
        from_writes = decays.until_end * dot(v, d_operand)
        yield
        # Of the log decay of token t: the pairs j < t <= i, the reads of the state from t on, the writes to it before t, and the state.
        # Pairs on one side of t are in both sums of their difference. A token with itself, which has no decay, adds nothing to it.
        d_decay = sums(addends_ref[...], by_pairs.met[0] * d_q - by_pairs.met_k * by_pairs.k, k * from_writes)
        yield
        d_decay_ref[0, :, keys] = d_decay + decays.total * jnp.sum(states_ref[0, 0, h] * d_next, axis=0, keepdims=True)
        yield
        d_q_ref[0, :, keys] = by_pairs.with_itself(d_q, k).astype(dtype)
        d_k_ref[0, :, keys] = (by_pairs.with_itself(by_pairs.k, q) + from_writes).astype(dtype)
        yield
        reads, writes = ((x * decay).astype(dtype) for x, decay in ((q, decays.since_start), (k, decays.until_end)))
        # One product over the tokens of the chunk and the state after it.
        weights = jnp.concatenate([scores_ref[0, :, pairs].T, writes], axis=1)
        d_v = dot(weights, jnp.concatenate([d_o, d_operand.T]))
        read = dot(d_o, reads, (0, 0))
        yield
        d_v_ref[0, :, values] = d_v.astype(dtype)
        d_state_ref[0, h] = decays.total * d_next + read

    by_heads(plan.heads, log_decay_ref, spans_ref, head)
