"""The gated delta rule as Mosaic TPU kernels, forward and backward, for decays a channel, a head, or none.

The grid is (B, groups of heads, chunks of T); chunks run in order, the states of a group's heads in VMEM between them. A chunk of
C tokens that starts from the state S, with c_i the sum of the log decays up to and with token i and E_ij = exp(c_i - c_j), is

    e = X (v - exp(c) S^T k)        X = (I + A)^-1        A_ij = (k_i . k_j) E_ij beta_j for j < i
    o_i = scale * (sum_{j<=i} (q_i . k_j) E_ij beta_j e_j + exp(c_i) S^T q_i)        S' = exp(c_C) S + sum_j exp(c_C - c_j) beta_j k_j e_j^T

Here e_i, what the state before token i gets wrong about v_i, stands for the updates u_i = beta_i e_i of :mod:`.chunk`: so beta is only
ever a factor of columns, which costs no broadcast. For the backward pass forward keeps, in the operands' dtype, the state before each
chunk, e and X. Decays are those of :mod:`pallas_kernels.gated_linear_attention.tpu`: sums in two parts, and RESET at a document's start.

That is for decays a head: :mod:`.tpu_forward` and :mod:`.tpu_backward`. Where c_i has a part a channel, exp(c_i - c_j) stands inside of the
products over channels: :mod:`.tpu_per_channel`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import checks, platforms
from pallas_kernels.gated_delta_rule import tpu_backward, tpu_forward, tpu_per_channel
from pallas_kernels.gated_delta_rule.tpu_gates import HEADS
from pallas_kernels.gated_linear_attention import tpu_layout
from pallas_kernels.gated_linear_attention.tpu_blocking import blocking
from pallas_kernels.gated_linear_attention.tpu_decays import RESET, running_sums
from pallas_kernels.segments import Segments


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None) -> bool:
    """Whether this kernel is the fastest measured implementation on TPU for such arrays."""
    arrays = (q, k, v, beta) if log_decay is None else (q, k, v, beta, log_decay)
    return all(x.dtype in checks.KERNEL_DTYPES for x in arrays)


def gated_delta_rule(q, k, v, beta, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in v's dtype, the final state [B,HV,K,V] in float32).

    Matrix products take operands in v's dtype. Raises ValueError for dtypes other than float32 and bfloat16.
    """
    if log_decay is None:
        log_decay = jnp.zeros_like(beta, dtype=jnp.float32)
    checks.check_kernel_dtypes("gated_delta_rule", q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    B, T, HV, V = v.shape
    K, dtype = q.shape[3], v.dtype
    per_channel = log_decay.ndim == 4
    tuned = blocking(dtype)
    heads = tuned.heads_a_step(B, HV, K * V * dtype.itemsize)
    plan = Plan(scale, tuned.tokens, heads, tuned.compiler_params, per_channel)

    beta, log_decay = beta.astype(jnp.float32), log_decay.astype(jnp.float32)
    q, k = (jnp.repeat(x.astype(dtype), HV // q.shape[2], axis=2) for x in (q, k))
    if segments is not None:
        log_decay = jnp.where(tpu_layout.like(segments.starts, log_decay), RESET, log_decay)
        q, k, v, beta, log_decay = (jnp.where(tpu_layout.like(segments.real, x), x, 0) for x in (q, k, v, beta, log_decay))

    columns = partial(tpu_layout.columns, tokens=plan.tokens)
    rows = partial(tpu_layout.rows, tokens=plan.tokens, heads=heads)
    state = tpu_layout.padded_state(initial_state)
    log_decay = columns(log_decay) if per_channel else rows(jnp.maximum(log_decay, RESET))
    o, final_state = _run(plan, columns(q), columns(k), columns(v), rows(beta), log_decay, plan.turned(state))
    return o.reshape(B, o.shape[1], HV, -1)[:, :T, :, :V], plan.turned(final_state)[:, :, :K, :V]


class Plan(NamedTuple):
    """scale; tokens: C; heads: G, that a step of the grid takes; compiler_params; per_channel: the kind of decay."""

    scale: float
    tokens: int
    heads: int
    compiler_params: pltpu.CompilerParams
    per_channel: bool

    def turned(self, state):
        """From [...,K,V] to how the kernels have states, [...,V,K] for decays a channel, and back."""
        return jnp.swapaxes(state, -1, -2) if self.per_channel else state


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, q, k, v, beta, log_decay, initial_state):
    return _forward_call(plan, q, k, v, _gates(plan, beta, log_decay, v.dtype), initial_state, keep=False)


def _run_forward(plan, q, k, v, beta, log_decay, initial_state):
    gates = _gates(plan, beta, log_decay, v.dtype)
    o, final_state, *kept = _forward_call(plan, q, k, v, gates, initial_state, keep=True)
    return (o, final_state), (q, k, v, gates, kept)


def _gates(plan, beta, log_decay, dtype):
    """beta [B,HV/G,G,T]; log_decay the same, or [B,T,HV K] -> what the kernels take for them.

    For decays a head [B,HV/G,3*8,T]: beta and both parts of the running sums, each padded to 8 heads.
    """
    if plan.per_channel:
        return tpu_per_channel.gates(plan, beta, log_decay, dtype)
    gates = jnp.concatenate([beta, running_sums(log_decay, plan.tokens)], axis=2)
    gates = gates.reshape(*gates.shape[:2], 3, plan.heads, -1)
    gates = jnp.pad(gates, [(0, 0)] * 3 + [(0, HEADS - plan.heads), (0, 0)])
    return (gates.reshape(*gates.shape[:2], 3 * HEADS, -1),)


def _run_backward(plan, residuals, cotangents):
    d_q, d_k, d_v, *d_gates, d_initial_state = _backward_call(plan, *residuals, *cotangents)
    if not plan.per_channel:
        d_gates = jnp.split(*d_gates, 2, axis=2)
    return d_q, d_k, d_v, *d_gates, d_initial_state


_run.defvjp(_run_forward, _run_backward)


class _Blocks(NamedTuple):
    """The grid, and the block of each kind of array that a step of it works on; where ``reverse``, the last chunk comes first."""

    grid: tuple[int, int, int]
    keys: pl.BlockSpec  # [B,T,HV K]
    values: pl.BlockSpec  # [B,T,HV V]
    gates: tuple[pl.BlockSpec, ...]  # [B,HV/G,3*8,T]; for decays a channel [B,HV/G,G,T], as the keys, and constants
    d_gates: tuple[pl.BlockSpec, ...]  # [B,HV/G,2G,T]; for decays a channel [B,HV/G,G,T] and as the keys
    state: pl.BlockSpec  # [B,HV,K,V], or turned
    kept: tuple[pl.BlockSpec, ...]  # the results of _forward_call that the backward pass takes

    @classmethod
    def of(cls, plan: Plan, q, v, gates, state_shape, reverse: bool) -> "_Blocks":
        C, G, N, HV = plan.tokens, plan.heads, q.shape[1] // plan.tokens, state_shape[1]

        def at(n):
            return N - 1 - n if reverse else n

        def tokens(x):
            return pl.BlockSpec((1, C, G * x.shape[2] // HV), lambda b, h, n: (b, at(n), h))

        def rows(count):
            return pl.BlockSpec((1, 1, count, C), lambda b, h, n: (b, h, 0, at(n)))

        def squares(*shape):
            return pl.BlockSpec((1, 1, G, *shape), lambda b, h, n: (b, at(n), h, 0, 0))

        constants = [pl.BlockSpec(x.shape, lambda b, h, n: (0, 0)) for x in gates[2:]]
        return cls(
            grid=(q.shape[0], HV // G, N),
            keys=tokens(q),
            values=tokens(v),
            gates=(rows(G), tokens(q), *constants) if plan.per_channel else (rows(3 * HEADS),),
            d_gates=(rows(G), tokens(q)) if plan.per_channel else (rows(2 * G),),
            state=pl.BlockSpec((1, G, *state_shape[2:]), lambda b, h, n: (b, h, 0, 0)),
            kept=(squares(*state_shape[2:]), tokens(v), squares(C, C), *[squares(2 * C, C)] * plan.per_channel),
        )


def _forward_call(plan, q, k, v, gates, initial_state, keep: bool):
    """(o [B,T,HV V], the final state [B,HV,K,V]) and, if asked to keep them for the backward pass, in v's dtype,
    the states before each chunk [B,N,HV,K,V], e [B,T,HV V], X [B,N,HV,C,C] and, for decays a channel, the scores [B,N,HV,2C,C]."""
    blocks = _Blocks.of(plan, q, v, gates, initial_state.shape, reverse=False)
    B, HV, *state_shape = initial_state.shape
    C, squares = plan.tokens, (B, blocks.grid[2], HV)
    kept = [(*squares, *state_shape), v.shape, (*squares, C, C), (*squares, 2 * C, C)][: len(blocks.kept) if keep else 0]
    kept = [jax.ShapeDtypeStruct(shape, v.dtype) for shape in kept]
    out_shape = jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(initial_state.shape, jnp.float32), *kept
    return platforms.pallas_call(
        partial(tpu_per_channel.forward if plan.per_channel else tpu_forward.kernel, plan),
        name="gated_delta_rule_forward",
        grid=blocks.grid,
        in_specs=[blocks.keys, blocks.keys, blocks.values, *blocks.gates, blocks.state],
        out_specs=[blocks.values, blocks.state, *blocks.kept[: len(kept)]],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((plan.heads, *state_shape), jnp.float32)],
        compiler_params=plan.compiler_params,
        cost_estimate=tpu_layout.cost(plan.tokens, HV, (q, k, v, *out_shape), products=(6, 3)),
    )(q, k, v, *gates, initial_state)


def _backward_call(plan, q, k, v, gates, kept, d_o, d_final_state):
    """The gradients of q, k, v, the gates (beta [B,HV/G,G,T] and log_decay [B,T,HV K], or both in [B,HV/G,2G,T]) and the initial state."""
    blocks = _Blocks.of(plan, q, v, gates, d_final_state.shape, reverse=True)
    B, HV, *state_shape = d_final_state.shape
    if plan.per_channel:
        d_gates = gates[:2]
    else:
        d_gates = (jax.ShapeDtypeStruct((B, HV // plan.heads, 2 * plan.heads, q.shape[1]), jnp.float32),)
    return platforms.pallas_call(
        partial(tpu_per_channel.backward if plan.per_channel else tpu_backward.kernel, plan),
        name="gated_delta_rule_backward",
        grid=blocks.grid,
        in_specs=[blocks.keys, blocks.keys, blocks.values, *blocks.gates, *blocks.kept, blocks.values, blocks.state],
        out_specs=[blocks.keys, blocks.keys, blocks.values, *blocks.d_gates, blocks.state],
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, *d_gates, d_final_state)),
        scratch_shapes=[pltpu.VMEM((plan.heads, *state_shape), jnp.float32)],
        compiler_params=plan.compiler_params,
        cost_estimate=tpu_layout.cost(plan.tokens, HV, (q, k, v, q, k, v, v, *d_gates, *kept), products=(11, 6)),
    )(q, k, v, *gates, *kept, d_o, d_final_state)
