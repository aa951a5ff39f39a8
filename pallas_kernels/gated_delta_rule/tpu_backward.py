"""The backward kernel of :mod:`.tpu`: the gradients of one chunk of a group of heads, each stage for all heads before the next.

With D the gradients (of o without its scale) and all else as at the head of :mod:`.tpu`,

    D e_j = beta_j (sum_{i>=j} (q_i . k_j) E_ij D o_i + exp(c_C - c_j) (D S')^T k_j)        D v = X^T D e        D A = -(D v) e^T
    D S = exp(c_C) D S' + sum_i exp(c_i) (q_i (D o_i)^T - k_i (D v_i)^T)

and D beta_j adds up what column j of the scores, of A and of the writes have beside the factor beta_j.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.tpu_gates import gates
from pallas_kernels.gated_linear_attention.tpu_decays import as_wide, dot


def kernel(plan, *refs):
    """Blocks of the operands, the results and the scratch as in ``tpu._backward_call``."""
    q_ref, k_ref, v_ref, gates_ref, states_ref, errors_ref, inverses_ref, d_o_ref, d_final_ref, *refs = refs
    d_q_ref, d_k_ref, d_v_ref, d_gates_ref, d_initial_ref, d_state = refs
    n = pl.program_id(2)
    C, dtype, (K, V) = plan.tokens, v_ref.dtype, d_state.shape[1:]

    @pl.when(n == 0)
    def _():
        d_state[...] = d_final_ref[0]

    heads = range(plan.heads)
    of = gates(gates_ref[0, 0], plan.heads, write=True)
    keys, values = ([slice(h * width, (h + 1) * width) for h in heads] for width in (K, V))
    q, k = [q_ref[0, :, x] for x in keys], [k_ref[0, :, x] for x in keys]
    d_o = [(plan.scale * d_o_ref[0, :, x]).astype(dtype) for x in values]
    errors = [errors_ref[0, :, x] for x in values]
    decays = [of[h].between * of[h].beta for h in heads]
    since_start, write = [as_wide(x.since_start, K) for x in of], [as_wide(x.write, K) for x in of]
    d_after = [d_state[h] for h in heads]
    d_next = [x.astype(dtype) for x in d_after]

    pairs = [dot(jnp.concatenate([q[h], k[h]], axis=0), k[h], (1, 1)) for h in heads]
    scores = [(pairs[h][:C] * decays[h]).astype(dtype) for h in heads]
    d_errors = [dot(scores[h], d_o[h], (0, 0)) + dot((k[h] * write[h]).astype(dtype), d_next[h]) for h in heads]
    d_targets = [dot(inverses_ref[0, 0, h], d_errors[h].astype(dtype), (0, 0)).astype(dtype) for h in heads]

    i, t = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    d_met = [jnp.concatenate([d_o[h], -d_targets[h]], axis=0) for h in heads]
    d_pairs = [dot(d_met[h], errors[h], (1, 1)) for h in heads]
    d_pairs = [jnp.concatenate([x[:C], jnp.where(i > t, x[C:], 0)], axis=0) for x in d_pairs]
    d_reads = [dot(d_met[h], states_ref[0, 0, h], (1, 1)) for h in heads]
    d_writes = [dot(errors[h], d_next[h], (1, 1)) for h in heads]
    for h in heads:
        d_scores, d_lower = ((x * decays[h]).astype(dtype) for x in (d_pairs[h][:C], d_pairs[h][C:]))
        d_q_ref[0, :, keys[h]] = (dot(d_scores, k[h]) + since_start[h] * d_reads[h][:C]).astype(dtype)
        d_k = dot(d_scores, q[h], (0, 0)) + dot(d_lower, k[h], (0, 0)) + dot(d_lower, k[h])
        d_k_ref[0, :, keys[h]] = (d_k + write[h] * d_writes[h] + since_start[h] * d_reads[h][C:]).astype(dtype)
        d_v_ref[0, :, values[h]] = d_targets[h]
        reads = jnp.concatenate([q[h] * since_start[h], k[h] * since_start[h]], axis=0).astype(dtype)
        d_state[h] = of[h].total * d_after[h] + dot(reads, d_met[h], (0, 0))

    # Of the log decay of token t: every pair j < t <= i, the reads of the state from t on, the writes to it before t, and the state.
    before = (i < t).astype(dtype)
    for h in heads:
        by_pairs = (d_pairs[h][:C] * pairs[h][:C] + d_pairs[h][C:] * pairs[h][C:]) * of[h].between
        by_writes = _row_sums(k[h] * d_writes[h])
        d_beta = _column_sums(by_pairs) + of[h].until_end * _column_sums(jnp.where(i == t, by_writes, 0))
        by_pairs = dot((by_pairs * of[h].beta).astype(dtype), before)
        by_reads = _row_sums(since_start[h] * (q[h] * d_reads[h][:C] + k[h] * d_reads[h][C:]))
        by_writes = as_wide(of[h].write, C) * by_writes
        by_state = of[h].total * jnp.sum(states_ref[0, 0, h] * d_after[h], keepdims=True)
        d_gates_ref[0, 0, h : h + 1] = d_beta
        d_decay = _column_sums(jnp.where(i >= t, by_pairs + by_reads, by_writes))
        d_gates_ref[0, 0, plan.heads + h : plan.heads + h + 1] = d_decay + by_state

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        d_initial_ref[0] = d_state[...]


def _row_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _column_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)
