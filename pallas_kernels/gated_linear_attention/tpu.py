"""Gated linear attention with one decay a head as Mosaic TPU kernels, forward and backward.

The grid is (B, groups of heads, chunks of T); chunks run in order, the states of a group's heads in VMEM between them. In a
chunk of C tokens that starts from the state S, with c_i the sum of the log decays up to and with token i,

    o_i = scale * (sum_{j<=i} (q_i . k_j) exp(c_i - c_j) v_j + exp(c_i) S^T q_i)     S' = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

The backward pass reads the state before each chunk, which forward keeps in the operands' dtype, and computes the rest again.

A difference of running sums is inexact where a strong decay stands before a weak one, so a sum has two parts: that of the log
decays rounded to sixteenths, which float32 adds up without any error, and that of the small rests. A new document is a log
decay of RESET at its first token, which no state survives; padding has neither keys nor decay.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import checks, platforms
from pallas_kernels.segments import Segments

LANES = 128
RESET = -1024.0  # exp of it is 0 in float32; sums over a chunk stay exact in sixteenths


class Blocking(NamedTuple):
    """tokens: C, of a chunk. heads: the most that a step of the grid takes. state_bytes: the most that their states take as operands."""

    tokens: int
    heads: int
    state_bytes: int

    def heads_a_step(self, heads: int, state_bytes: int) -> int:
        """The largest number that divides ``heads`` and is within the limits, for states of ``state_bytes`` a head."""
        most = min(self.heads, max(1, self.state_bytes // state_bytes))
        return next(n for n in range(most, 0, -1) if heads % n == 0)


# Within the VMEM of all generations; those tuned, for bfloat16, within that of their own.
DEFAULT = Blocking(tokens=128, heads=4, state_bytes=2**18)
LARGER = Blocking(tokens=128, heads=8, state_bytes=2**19)
TUNED = {"v5e": LARGER, "v5p": LARGER, "tpu7x": LARGER, "v6e": LARGER._replace(state_bytes=2**21)}


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> bool:
    """Whether this kernel is the fastest measured implementation on TPU for such arrays."""
    return log_decay.ndim < 4 and all(x.dtype in checks.KERNEL_DTYPES for x in (q, k, v, log_decay))


def gated_linear_attention(q, k, v, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in v's dtype, the final state [B,HV,K,V] in float32).

    Matrix products take operands in v's dtype. Raises ValueError for decays a channel, and dtypes other than float32 and bfloat16.
    """
    if log_decay.ndim == 4:
        raise ValueError("gated_linear_attention: log_decay is [B,T,HV,K], implementation='pallas' needs [B,T,HV] or [HV]")
    checks.check_kernel_dtypes("gated_linear_attention", q=q, k=k, v=v, log_decay=log_decay)
    B, T, HV, V = v.shape
    K, dtype = q.shape[3], v.dtype
    blocking = TUNED.get(platforms.generation(), DEFAULT) if dtype == jnp.bfloat16 else DEFAULT
    heads = blocking.heads_a_step(HV, K * V * dtype.itemsize)

    log_decay = jnp.broadcast_to(log_decay.astype(jnp.float32), (B, T, HV))
    q, k = (jnp.repeat(x.astype(dtype), HV // q.shape[2], axis=2) for x in (q, k))
    if segments is not None:
        log_decay = jnp.where(segments.starts[..., None], RESET, log_decay)
        q, k, v, log_decay = (jnp.where(segments.real.reshape(B, T, *[1] * (x.ndim - 2)), x, 0) for x in (q, k, v, log_decay))

    def columns(x, width):  # [B,T,HV,width] -> [B,N C,HV W], W whole registers
        x = jnp.pad(x, [(0, 0), (0, -T % blocking.tokens), (0, 0), (0, -width % LANES)])
        return x.reshape(*x.shape[:2], -1)

    log_decay = jnp.pad(jnp.maximum(log_decay, RESET), [(0, 0), (0, -T % blocking.tokens), (0, 0)])
    log_decay = jnp.moveaxis(log_decay, 1, 2).reshape(B, HV // heads, heads, -1)
    state = jnp.pad(initial_state.astype(jnp.float32), [(0, 0), (0, 0), (0, -K % LANES), (0, -V % LANES)])
    plan = Plan(scale, blocking.tokens, heads)
    o, final_state = _run(plan, columns(q, K), columns(k, K), columns(v, V), log_decay, state)
    return o.reshape(B, o.shape[1], HV, -1)[:, :T, :, :V], final_state[:, :, :K, :V]


class Plan(NamedTuple):
    """scale; tokens: C; heads: G, that a step of the grid takes."""

    scale: float
    tokens: int
    heads: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, q, k, v, log_decay, initial_state):
    return _run_forward(plan, q, k, v, log_decay, initial_state)[0]


def _run_forward(plan, q, k, v, log_decay, initial_state):
    sums = _running_sums(plan, log_decay)
    o, final_state, states = _forward_call(plan, q, k, v, sums, initial_state)
    return (o, final_state), (q, k, v, sums, states)


def _run_backward(plan, residuals, cotangents):
    return tuple(_backward_call(plan, *residuals, *cotangents))


_run.defvjp(_run_forward, _run_backward)


class _Blocks(NamedTuple):
    """The grid, and the block of each kind of array that a step of it works on; where ``reverse``, the last chunk comes first."""

    grid: tuple[int, int, int]
    keys: pl.BlockSpec  # [B,T,HV K]
    values: pl.BlockSpec  # [B,T,HV V]
    sums: pl.BlockSpec  # [B,HV/G,2G,T]
    decays: pl.BlockSpec  # [B,HV/G,G,T]
    state: pl.BlockSpec  # [B,HV,K,V]
    states: pl.BlockSpec  # [B,N,HV,K,V]

    @classmethod
    def of(cls, plan: Plan, q, v, state_shape, reverse: bool) -> "_Blocks":
        C, G, (HV, K, V) = plan.tokens, plan.heads, state_shape[-3:]
        N = q.shape[1] // C

        def at(n):
            return N - 1 - n if reverse else n

        return cls(
            (q.shape[0], HV // G, N),
            pl.BlockSpec((1, C, G * K), lambda b, h, n: (b, at(n), h)),
            pl.BlockSpec((1, C, G * V), lambda b, h, n: (b, at(n), h)),
            pl.BlockSpec((1, 1, 2 * G, C), lambda b, h, n: (b, h, 0, at(n))),
            pl.BlockSpec((1, 1, G, C), lambda b, h, n: (b, h, 0, at(n))),
            pl.BlockSpec((1, G, K, V), lambda b, h, n: (b, h, 0, 0)),
            pl.BlockSpec((1, 1, G, K, V), lambda b, h, n: (b, at(n), h, 0, 0)),
        )


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _forward_call(plan, q, k, v, sums, initial_state):
    """(o [B,T,HV V], the final state [B,HV,K,V], the states before each chunk [B,N,HV,K,V])."""
    blocks = _Blocks.of(plan, q, v, initial_state.shape, reverse=False)
    B, HV, K, V = initial_state.shape
    states = jax.ShapeDtypeStruct((B, blocks.grid[2], HV, K, V), v.dtype)
    return platforms.pallas_call(
        partial(_forward_kernel, plan),
        name="gated_linear_attention_forward",
        grid=blocks.grid,
        in_specs=[blocks.keys, blocks.keys, blocks.values, blocks.sums, blocks.state],
        out_specs=[blocks.values, blocks.state, blocks.states],
        out_shape=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(initial_state.shape, jnp.float32), states),
        scratch_shapes=[pltpu.VMEM((plan.heads, K, V), jnp.float32)],
        compiler_params=_PARAMS,
        cost_estimate=_cost(plan, K, (q, k, v, v, states), products=(2, 2)),
    )(q, k, v, sums, initial_state)


def _backward_call(plan, q, k, v, sums, states, d_o, d_final_state):
    """The gradients of q, k, v, log_decay and the initial state."""
    blocks = _Blocks.of(plan, q, v, states.shape, reverse=True)
    B, _, HV, K, V = states.shape
    return platforms.pallas_call(
        partial(_backward_kernel, plan),
        name="gated_linear_attention_backward",
        grid=blocks.grid,
        in_specs=[blocks.keys, blocks.keys, blocks.values, blocks.sums, blocks.states, blocks.values, blocks.state],
        out_specs=[blocks.keys, blocks.keys, blocks.values, blocks.decays, blocks.state],
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, sums[:, :, : plan.heads], d_final_state)),
        scratch_shapes=[pltpu.VMEM((plan.heads, K, V), jnp.float32)],
        compiler_params=_PARAMS,
        cost_estimate=_cost(plan, K, (q, k, v, states, v, q, k, v), products=(6, 4)),
    )(q, k, v, sums, states, d_o, d_final_state)


def _cost(plan, K, moved, products) -> pl.CostEstimate:
    """``products``: how many are over pairs of tokens, and how many meet the state; XLA's own estimates take it from here."""
    (B, T, width), v, (pairs, meetings) = moved[0].shape, moved[2], products
    return pl.CostEstimate(
        flops=2 * B * T * v.shape[2] * (pairs * plan.tokens + meetings * K),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        transcendentals=B * T * (width // K) * plan.tokens,
    )


class _Decays(NamedTuple):
    """Of one head of a chunk, all float32; those [C,128] have a token's value in all lanes.

    between: [C,C], exp(c_i - c_j) for j <= i, else 0.
    since_start: [C,128], exp(c_i).
    until_end: [C,128], exp(c_C - c_j); across: [1,C], the same as a row.
    total: [1,1], exp(c_C).
    """

    between: jax.Array
    since_start: jax.Array
    until_end: jax.Array
    across: jax.Array
    total: jax.Array


def _decays(sums: jax.Array) -> list[_Decays]:
    """The running sums [2G,C] of a chunk -> the decays of each head."""
    G, C = sums.shape[0] // 2, sums.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    columns = sums.T  # [C,2G]
    heads = []
    for head in range(G):
        coarse_j, fine_j = sums[head : head + 1], sums[G + head : G + head + 1]
        coarse_i, fine_i = (jnp.broadcast_to(columns[:, g : g + 1], (C, LANES)) for g in (head, G + head))
        coarse_end, fine_end = coarse_j[:, C - 1 :], fine_j[:, C - 1 :]
        log_between = (_as_wide(coarse_i, C) - coarse_j) + (_as_wide(fine_i, C) - fine_j)
        heads.append(
            _Decays(
                between=jnp.exp(jnp.where(i >= j, log_between, -jnp.inf)),
                since_start=jnp.exp(coarse_i + fine_i),
                until_end=jnp.exp((coarse_end - coarse_i) + (fine_end - fine_i)),
                across=jnp.exp((coarse_end - coarse_j) + (fine_end - fine_j)),
                total=jnp.exp(coarse_end + fine_end),
            )
        )
    return heads


def _as_wide(x: jax.Array, width: int) -> jax.Array:
    """[C,128] with equal lanes -> [C,width], with no register moved."""
    return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x


def _running_sums(plan, log_decay: jax.Array) -> jax.Array:
    """log_decay [B,HV/G,G,T] -> [B,HV/G,2G,T]: the sums from a chunk's start up to and with each token, coarse and fine parts."""
    coarse = jnp.round(log_decay * 16) / 16
    parts = jnp.concatenate([coarse, log_decay - coarse], axis=2)
    chunks = parts.reshape(*parts.shape[:3], -1, plan.tokens)
    upper = jnp.triu(jnp.ones((plan.tokens, plan.tokens), jnp.float32))
    return jnp.einsum("bhgnt,ti->bhgni", chunks, upper, precision=jax.lax.Precision.HIGHEST).reshape(parts.shape)


def _dot(x: jax.Array, y: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices over axis ``over`` of each, in float32."""
    return jax.lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(plan, q_ref, k_ref, v_ref, sums_ref, initial_ref, o_ref, final_ref, states_ref, state):
    n = pl.program_id(2)
    dtype, (K, V) = v_ref.dtype, state.shape[1:]

    @pl.when(n == 0)
    def _():
        state[...] = initial_ref[0]

    states_ref[0, 0] = state[...].astype(dtype)
    heads = range(plan.heads)
    decays = _decays(sums_ref[0, 0])
    keys, values = ([slice(h * width, (h + 1) * width) for h in heads] for width in (K, V))
    q, k, v = [q_ref[0, :, x] for x in keys], [k_ref[0, :, x].T for x in keys], [v_ref[0, :, x] for x in values]
    products = [_dot(q[h], k[h]) for h in heads]
    reads = [(q[h] * _as_wide(decays[h].since_start, K)).astype(dtype) for h in heads]
    read = [_dot(reads[h], states_ref[0, 0, h]) for h in heads]
    writes = [(k[h] * decays[h].across).astype(dtype) for h in heads]
    written = [_dot(writes[h], v[h]) for h in heads]
    scores = [(products[h] * decays[h].between).astype(dtype) for h in heads]
    o = [_dot(scores[h], v[h]) + read[h] for h in heads]
    for h in heads:
        o_ref[0, :, values[h]] = (plan.scale * o[h]).astype(dtype)
        state[h] = decays[h].total * state[h] + written[h]

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        final_ref[0] = state[...]


def _backward_kernel(
    plan, q_ref, k_ref, v_ref, sums_ref, states_ref, d_o_ref, d_final_ref, d_q_ref, d_k_ref, d_v_ref, d_decay_ref, d_initial_ref, d_state
):
    n = pl.program_id(2)
    C, dtype, (K, V) = plan.tokens, v_ref.dtype, d_state.shape[1:]

    @pl.when(n == 0)
    def _():
        d_state[...] = d_final_ref[0]

    heads = range(plan.heads)
    decays = _decays(sums_ref[0, 0])
    keys, values = ([slice(h * width, (h + 1) * width) for h in heads] for width in (K, V))
    q, k, v = [q_ref[0, :, x] for x in keys], [k_ref[0, :, x] for x in keys], [v_ref[0, :, x] for x in values]
    d_o = [(plan.scale * d_o_ref[0, :, x]).astype(dtype) for x in values]
    since_start, until_end = [_as_wide(d.since_start, K) for d in decays], [_as_wide(d.until_end, K) for d in decays]
    reads, writes = [q[h] * since_start[h] for h in heads], [k[h] * until_end[h] for h in heads]
    d_next = [d_state[h] for h in heads]
    d_next_operand = [x.astype(dtype) for x in d_next]

    products = [_dot(q[h], k[h], (1, 1)) for h in heads]
    d_products = [_dot(d_o[h], v[h], (1, 1)) * decays[h].between for h in heads]
    d_reads = [_dot(d_o[h], states_ref[0, 0, h], (1, 1)) for h in heads]
    d_writes = [_dot(v[h], d_next_operand[h], (1, 1)) for h in heads]
    for h in heads:
        d_scores, scores = d_products[h].astype(dtype), (products[h] * decays[h].between).astype(dtype)
        d_q_ref[0, :, keys[h]] = (_dot(d_scores, k[h]) + since_start[h] * d_reads[h]).astype(dtype)
        d_k_ref[0, :, keys[h]] = (_dot(d_scores, q[h], (0, 0)) + until_end[h] * d_writes[h]).astype(dtype)
        d_v_ref[0, :, values[h]] = (_dot(scores, d_o[h], (0, 0)) + _dot(writes[h].astype(dtype), d_next_operand[h])).astype(dtype)
        d_state[h] = decays[h].total * d_next[h] + _dot(reads[h].astype(dtype), d_o[h], (0, 0))

    # Of the log decay of token t: every pair j < t <= i, the reads of the state from t on, the writes to it before t, and the state.
    i, t = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    before = (i < t).astype(dtype)
    for h in heads:
        pairs = _dot((d_products[h] * products[h]).astype(dtype), before)
        from_reads = jnp.sum(reads[h] * d_reads[h], axis=1, keepdims=True)
        from_writes = jnp.sum(writes[h] * d_writes[h], axis=1, keepdims=True)
        kept = decays[h].total * jnp.sum(states_ref[0, 0, h] * d_next[h], keepdims=True)
        d_decay = jnp.sum(jnp.where(i >= t, pairs + from_reads, from_writes), axis=0, keepdims=True)
        d_decay_ref[0, 0, h : h + 1] = d_decay + kept

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        d_initial_ref[0] = d_state[...]
