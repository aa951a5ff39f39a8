"""The kernels of gated linear attention with a decay a head. See :mod:`.tpu`."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_linear_attention.tpu_decays import RESET, as_wide, dot, per_head, running_sums
from pallas_kernels.gated_linear_attention.tpu_stages import run


def operands(plan, log_decay, dtype):
    """What the kernels take for the log decays [B,HV/G,G,T]: their running sums."""
    return (running_sums(jnp.maximum(log_decay, RESET), plan.tokens),)


def forward(plan, q_ref, k_ref, v_ref, sums_ref, initial_ref, o_ref, state_ref, *kept_refs):
    C, dtype, (K, V) = plan.tokens, v_ref.dtype, state_ref.shape[2:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    before = [state_ref[0, h].astype(dtype) for h in range(plan.heads)]
    if kept_refs:
        for h, state in enumerate(before):
            kept_refs[0][0, 0, h] = state

    def head(h):
        keys, values = (slice(h * width, (h + 1) * width) for width in (K, V))
        k_columns = k_ref[0, :, keys].T
        decays = per_head(sums_ref[0, 0], h)
        yield
        # Two products: the queries with the keys and the state, and the scores and the keys that are written with the values.
        met = dot(q_ref[0, :, keys], jnp.concatenate([k_columns, before[h]], axis=1))
        yield
        weights = jnp.concatenate([met[:, :C] * decays.between, k_columns * decays.across]).astype(dtype)
        yield
        taken = dot(weights, v_ref[0, :, values])
        yield
        o_ref[0, :, values] = (plan.scale * (taken[:C] + as_wide(decays.since_start, V) * met[:, C:])).astype(dtype)
        state_ref[0, h] = decays.total * state_ref[0, h] + taken[C:]

    run(head(h) for h in range(plan.heads))


def backward(plan, q_ref, k_ref, v_ref, sums_ref, states_ref, d_o_ref, d_final_ref, d_q_ref, d_k_ref, d_v_ref, d_decay_ref, d_state_ref):
    n = pl.program_id(2)
    C, dtype, (K, V) = plan.tokens, v_ref.dtype, d_state_ref.shape[2:]

    @pl.when(n == 0)
    def _():
        d_state_ref[...] = d_final_ref[...]

    heads = range(plan.heads)
    decays = [per_head(sums_ref[0, 0], h) for h in heads]
    keys, values = ([slice(h * width, (h + 1) * width) for h in heads] for width in (K, V))
    q, k, v = [q_ref[0, :, x] for x in keys], [k_ref[0, :, x] for x in keys], [v_ref[0, :, x] for x in values]
    d_o = [(plan.scale * d_o_ref[0, :, x]).astype(dtype) for x in values]
    since_start, until_end = [as_wide(d.since_start, K) for d in decays], [as_wide(d.until_end, K) for d in decays]
    reads, writes = [q[h] * since_start[h] for h in heads], [k[h] * until_end[h] for h in heads]
    d_next = [d_state_ref[0, h] for h in heads]
    d_next_operand = [x.astype(dtype) for x in d_next]

    products = [dot(q[h], k[h], (1, 1)) for h in heads]
    d_products = [dot(d_o[h], v[h], (1, 1)) * decays[h].between for h in heads]
    d_reads = [dot(d_o[h], states_ref[0, 0, h], (1, 1)) for h in heads]
    d_writes = [dot(v[h], d_next_operand[h], (1, 1)) for h in heads]
    for h in heads:
        d_scores, scores = d_products[h].astype(dtype), (products[h] * decays[h].between).astype(dtype)
        d_q_ref[0, :, keys[h]] = (dot(d_scores, k[h]) + since_start[h] * d_reads[h]).astype(dtype)
        d_k_ref[0, :, keys[h]] = (dot(d_scores, q[h], (0, 0)) + until_end[h] * d_writes[h]).astype(dtype)
        d_v = dot(scores, d_o[h], (0, 0)) + dot(writes[h].astype(dtype), d_next_operand[h])
        d_v_ref[0, :, values[h]] = d_v.astype(dtype)
        d_state_ref[0, h] = decays[h].total * d_next[h] + dot(reads[h].astype(dtype), d_o[h], (0, 0))

    # Of the log decay of token t: every pair j < t <= i, the reads of the state from t on, the writes to it before t, and the state.
    i, t = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    before = (i < t).astype(dtype)
    for h in heads:
        pairs = dot((d_products[h] * products[h]).astype(dtype), before)
        from_reads = jnp.sum(reads[h] * d_reads[h], axis=1, keepdims=True)
        from_writes = jnp.sum(writes[h] * d_writes[h], axis=1, keepdims=True)
        kept = decays[h].total * jnp.sum(states_ref[0, 0, h] * d_next[h], keepdims=True)
        d_decay = jnp.sum(jnp.where(i >= t, pairs + from_reads, from_writes), axis=0, keepdims=True)
        d_decay_ref[0, 0, h : h + 1] = d_decay + kept
