"""The backward kernel of :mod:`.tpu`: the gradients of one chunk of a group of heads, each stage for all heads before the next.

With D the gradients (of o without its scale) and all else as at the head of :mod:`.tpu`,

    D u_j = sum_{i>=j} (q_i . k_j) E_ij D o_i + exp(c_C - c_j) (D S')^T k_j        D r = X^T D u        D A = -(D r) u^T
    D v = beta D r        D S = exp(c_C) D S' + sum_i exp(c_i) (q_i (D o_i)^T - beta_i k_i (D r_i)^T)

and D beta_i adds up what D r_i and D A_ij have beside the factor beta_i.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.tpu_gates import gates
from pallas_kernels.gated_linear_attention.tpu import _as_wide as as_wide
from pallas_kernels.gated_linear_attention.tpu import _dot as dot


def kernel(plan, *refs):
    """Blocks of the operands, the results and the scratch as in ``tpu._backward_call``."""
    q_ref, k_ref, v_ref, gates_ref, states_ref, updates_ref, inverses_ref, d_o_ref, d_final_ref, *refs = refs
    d_q_ref, d_k_ref, d_v_ref, d_gates_ref, d_initial_ref, d_state = refs
    n = pl.program_id(2)
    C, dtype, (K, V) = plan.tokens, v_ref.dtype, d_state.shape[1:]

    @pl.when(n == 0)
    def _():
        d_state[...] = d_final_ref[0]

    heads = range(plan.heads)
    decays = gates(gates_ref[0, 0], plan.heads, until_end=True)
    beta = [x.beta for x in decays]
    i, t = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    keys, values = ([slice(h * width, (h + 1) * width) for h in heads] for width in (K, V))
    q, k, v = [q_ref[0, :, x] for x in keys], [k_ref[0, :, x] for x in keys], [v_ref[0, :, x] for x in values]
    d_o = [(plan.scale * d_o_ref[0, :, x]).astype(dtype) for x in values]
    updates = [updates_ref[0, :, x] for x in values]
    since_start, until_end = [as_wide(d.since_start, K) for d in decays], [as_wide(d.until_end, K) for d in decays]
    query_reads, key_reads, writes = ([x[h] * decay[h] for h in heads] for x, decay in ((q, since_start), (k, since_start), (k, until_end)))
    d_next = [d_state[h] for h in heads]
    d_next_operand = [x.astype(dtype) for x in d_next]

    query_pairs, key_pairs = ([dot(x[h], k[h], (1, 1)) for h in heads] for x in (q, k))
    scores = [(query_pairs[h] * decays[h].between).astype(dtype) for h in heads]
    d_updates = [dot(scores[h], d_o[h], (0, 0)) + dot(writes[h].astype(dtype), d_next_operand[h]) for h in heads]
    d_errors = [dot(inverses_ref[0, 0, h], d_updates[h].astype(dtype), (0, 0)) for h in heads]  # D r, that is with beta apart
    d_errors_operand = [x.astype(dtype) for x in d_errors]

    d_query_pairs = [dot(d_o[h], updates[h], (1, 1)) * decays[h].between for h in heads]
    d_key_pairs = [jnp.where(i > t, -decays[h].between * dot(d_errors_operand[h], updates[h], (1, 1)), 0) for h in heads]
    d_query_reads, d_key_reads = ([dot(d[h], states_ref[0, 0, h], (1, 1)) for h in heads] for d in (d_o, d_errors_operand))
    d_writes = [dot(updates[h], d_next_operand[h], (1, 1)) for h in heads]
    for h in heads:
        beta_K, beta_V = as_wide(beta[h], K), as_wide(beta[h], V)
        d_scores, d_lower = d_query_pairs[h].astype(dtype), (as_wide(beta[h], C) * d_key_pairs[h]).astype(dtype)
        d_q_ref[0, :, keys[h]] = (dot(d_scores, k[h]) + since_start[h] * d_query_reads[h]).astype(dtype)
        d_k = dot(d_scores, q[h], (0, 0)) + dot(d_lower, k[h], (0, 0)) + dot(d_lower, k[h])
        d_k_ref[0, :, keys[h]] = (d_k + until_end[h] * d_writes[h] - beta_K * since_start[h] * d_key_reads[h]).astype(dtype)
        d_v_ref[0, :, values[h]] = (beta_V * d_errors[h]).astype(dtype)
        read = dot(query_reads[h].astype(dtype), d_o[h], (0, 0)) - dot((beta_K * key_reads[h]).astype(dtype), d_errors_operand[h], (0, 0))
        d_state[h] = decays[h].total * d_next[h] + read

    # Of the log decay of token t: every pair j < t <= i, the reads of the state from t on, the writes to it before t, and the state.
    before = (i < t).astype(dtype)
    for h in heads:
        of_key_pairs, of_key_reads = d_key_pairs[h] * key_pairs[h], key_reads[h] * d_key_reads[h]
        d_beta = _row_sums(d_errors[h] * v[h]) - _row_sums(of_key_reads) + _row_sums(of_key_pairs)
        pairs = dot((d_query_pairs[h] * query_pairs[h] + as_wide(beta[h], C) * of_key_pairs).astype(dtype), before)
        from_reads = _row_sums(query_reads[h] * d_query_reads[h] - as_wide(beta[h], K) * of_key_reads)
        from_writes = _row_sums(writes[h] * d_writes[h])
        kept = decays[h].total * jnp.sum(states_ref[0, 0, h] * d_next[h], keepdims=True)
        d_decay = jnp.sum(jnp.where(i >= t, pairs + from_reads, from_writes), axis=0, keepdims=True)
        d_gates_ref[0, 0, h : h + 1] = jnp.sum(jnp.where(i == t, d_beta, 0), axis=0, keepdims=True)
        d_gates_ref[0, 0, plan.heads + h : plan.heads + h + 1] = d_decay + kept

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        d_initial_ref[0] = d_state[...]


def _row_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)
