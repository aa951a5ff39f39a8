"""The kernels of :mod:`.tpu` for decays a channel, forward and backward; states are [V,K] here, so that such a decay is a row.

Scores of queries and of keys with the chunk's keys are those of :mod:`pallas_kernels.gated_linear_attention.tpu_decays`, exact for
any decay. Forward keeps them, without beta, for the backward pass: computing them again takes longer than reading them. With D the
gradients (of o without its scale), P the scores of queries, L those of keys before their own token, w_j = exp(c_C - c_j) k_j, and all
else as at the head of :mod:`.tpu`,

    D u_j = sum_{i>=j} P_ij D o_i + (D S')^T w_j        D v = X^T (beta D u)        D P = D o (beta e)^T        D L = -(D v) (beta e)^T

and D beta_j = e_j . (D u_j - sum_{i>j} L_ij D v_i). A key's gradient has a part as the one that reads and a part as the one that is
read: a log decay's gradient adds up the former of its own token and later ones, and takes off the latter.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.tpu_inverse import inverses, solve, whole
from pallas_kernels.gated_linear_attention.tpu_decays import LANES, as_wide, dot, sums
from pallas_kernels.gated_linear_attention.tpu_heads import by_heads, constants


def gates(plan, beta, log_decay, dtype):
    """What the kernels take for beta [B,HV/G,G,T] and the log decays [B,T,HV K]."""
    return beta, log_decay, *constants(plan.tokens, dtype)


def forward(plan, *refs):
    """Blocks of the operands, the results (those for the backward pass may be left out) and the scratch as in ``tpu._forward_call``."""
    q_ref, k_ref, v_ref, beta_ref, log_decay_ref, spans_ref, _, initial_ref, *refs = refs
    o_ref, final_ref, *kept_refs, state = refs
    n = pl.program_id(2)
    C, dtype, (V, K) = plan.tokens, v_ref.dtype, state.shape[1:]

    @pl.when(n == 0)
    def _():
        state[...] = initial_ref[0]

    heads = range(plan.heads)
    before = [state[h].astype(dtype) for h in heads]
    beta = [beta_ref[0, 0, h : h + 1] for h in heads]
    keys, values = ([slice(h * width, (h + 1) * width) for h in heads] for width in (K, V))

    def meet(h, decays):
        """Scores of queries and of keys, what these read of the state [2C,V], what is written [C,K], and what is left of the state."""
        q, k = (x[0, :, keys[h]].astype(jnp.float32) for x in (q_ref, k_ref))
        scores = yield from decays.scores([q, k], k, dtype)
        yield
        reads = jnp.concatenate([q * decays.since_start, k * decays.since_start]).astype(dtype)
        met = dot(reads, before[h], (1, 1))
        yield
        return *scores, met, (k * decays.until_end).astype(dtype), decays.total

    def use(met_heads):
        scores, lower, met, writes, total = zip(*met_heads, strict=True)
        with_beta = [lower[h] * beta[h] for h in heads]
        inverse = [x.astype(dtype) for x in inverses(with_beta, dtype)]
        below = [x[C // 2 :, : C // 2].astype(dtype) for x in with_beta]
        errors = solve(inverse, below, [v_ref[0, :, values[h]] - met[h][C:] for h in heads])
        updates = [(errors[h].astype(jnp.float32).T * beta[h]).astype(dtype) for h in heads]
        for h in heads:
            o = dot((scores[h] * beta[h]).astype(dtype), errors[h]) + met[h][:C]
            o_ref[0, :, values[h]] = (plan.scale * o).astype(dtype)
            state[h] = total[h] * state[h] + dot(updates[h], writes[h])

        if kept_refs:
            states_ref, errors_ref, inverses_ref, scores_ref = kept_refs
            for h, x in enumerate(whole(inverse, below)):
                states_ref[0, 0, h] = before[h]
                errors_ref[0, :, values[h]] = errors[h]
                inverses_ref[0, 0, h] = x
                scores_ref[0, 0, h] = jnp.concatenate([scores[h], lower[h]]).astype(dtype)

    by_heads(plan.heads, log_decay_ref, spans_ref, meet, use)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        final_ref[0] = state[...]


def backward(plan, *refs):
    """Blocks of the operands, the results and the scratch as in ``tpu._backward_call``."""
    q_ref, k_ref, v_ref, beta_ref, log_decay_ref, spans_ref, addends_ref, *refs = refs
    states_ref, errors_ref, inverses_ref, scores_ref, d_o_ref, d_final_ref, *refs = refs
    d_q_ref, d_k_ref, d_v_ref, d_beta_ref, d_decay_ref, d_initial_ref, d_state = refs
    n = pl.program_id(2)
    C, dtype, (V, K) = plan.tokens, v_ref.dtype, d_state.shape[1:]

    @pl.when(n == 0)
    def _():
        d_state[...] = d_final_ref[0]

    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    columns = beta_ref[0, 0].T  # [C,G]

    def head(h, decays):
        keys, values = (slice(h * width, (h + 1) * width) for width in (K, V))
        q, k = (x[0, :, keys].astype(jnp.float32) for x in (q_ref, k_ref))
        beta, errors = jnp.broadcast_to(columns[:, h : h + 1], (C, LANES)), errors_ref[0, :, values]
        d_o = (plan.scale * d_o_ref[0, :, values]).astype(dtype)
        d_after = d_state[h]
        d_next = d_after.astype(dtype)
        yield
        weights = jnp.concatenate([scores_ref[0, 0, h, :C].T, (k * decays.until_end).astype(dtype)], axis=1)
        d_updates = dot(weights, jnp.concatenate([d_o, d_next.T]))
        yield
        d_targets = dot(inverses_ref[0, 0, h], (as_wide(beta, V) * d_updates).astype(dtype), (0, 0)).astype(dtype)
        yield
        d_v_ref[0, :, values] = d_targets
        d_met = jnp.concatenate([d_o, -d_targets])
        d_pairs = dot(d_met, errors, (1, 1))
        yield
        d_reads = dot(d_met, states_ref[0, 0, h])
        d_scores, d_lower = d_pairs[:C], jnp.where(i > j, d_pairs[C:], 0)
        yield
        by_updates = jnp.where(i == j, _row_sums(d_updates * errors), 0)
        d_beta_ref[0, 0, h : h + 1] = _column_sums(by_updates + d_lower * scores_ref[0, 0, h, C:])
        yield
        across = beta_ref[0, 0, h : h + 1]
        by_pairs = yield from decays.gradients([d_scores * across, d_lower * across], [q, k], k, dtype)
        yield
        d_q, d_reader = by_pairs.rows
        d_q = d_q + decays.since_start * d_reads[:C]
        d_reader = d_reader + decays.since_start * d_reads[C:]
        from_writes = as_wide(beta, K) * decays.until_end * dot(errors, d_next)
        yield
        # Of the log decay of token t: the pairs j < t <= i, the reads of the state from t on, the writes to it before t, and the state.
        # Pairs on one side of t are in both sums of their difference. A token with itself, which has no decay, adds nothing to it.
        q_met, reader_met = by_pairs.met
        d_decay = sums(addends_ref[...], q_met * d_q + (reader_met * d_reader - by_pairs.met_k * by_pairs.k), k * from_writes)
        yield
        d_decay_ref[0, :, keys] = d_decay + decays.total * _column_sums(states_ref[0, 0, h] * d_after)
        yield
        d_q_ref[0, :, keys] = by_pairs.with_itself(d_q, k).astype(dtype)
        d_k_ref[0, :, keys] = (by_pairs.with_itself(d_reader + by_pairs.k, q) + from_writes).astype(dtype)
        yield
        reads = jnp.concatenate([q * decays.since_start, k * decays.since_start]).astype(dtype)
        read = dot(d_met, reads, (0, 0))
        yield
        d_state[h] = decays.total * d_after + read

    by_heads(plan.heads, log_decay_ref, spans_ref, head)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        d_initial_ref[0] = d_state[...]


def _row_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _column_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)
