"""Gated linear attention as Mosaic TPU kernels, forward and backward: what decays a head and decays a channel share.

The grid is (B, groups of heads, chunks of T); chunks run in order, the states of a group's heads in VMEM between them. In a
chunk of C tokens that starts from the state S, with c_i the sum of the log decays up to and with token i,

    o_i = scale * (sum_{j<=i} (q_i . k_j) exp(c_i - c_j) v_j + exp(c_i) S^T q_i)     S' = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

where a decay is one number or one a channel of k: :mod:`.tpu_per_head` and :mod:`.tpu_per_channel` have the kernels' bodies,
:mod:`.tpu_decays` how exp(c_i - c_j) is computed. With decays a channel a state is [V,K] inside, so that they are a row. The
backward pass reads the state before each chunk, which forward then keeps in the operands' dtype, and computes the rest again.

A new document is a log decay of RESET at its first token, which no state survives; padding has neither keys nor decay.
"""

from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import checks, platforms
from pallas_kernels.gated_linear_attention import tpu_layout, tpu_per_channel, tpu_per_head
from pallas_kernels.gated_linear_attention.tpu_blocking import blocking
from pallas_kernels.gated_linear_attention.tpu_decays import RESET
from pallas_kernels.segments import Segments


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> bool:
    """Whether this kernel is the fastest measured implementation on TPU for such arrays."""
    return all(x.dtype in checks.KERNEL_DTYPES for x in (q, k, v, log_decay))


def gated_linear_attention(q, k, v, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in v's dtype, the final state [B,HV,K,V] in float32).

    Matrix products take operands in v's dtype. Raises ValueError for dtypes other than float32 and bfloat16.
    """
    checks.check_kernel_dtypes("gated_linear_attention", q=q, k=k, v=v, log_decay=log_decay)
    B, T, HV, V = v.shape
    K, dtype = q.shape[3], v.dtype
    tuned = blocking(dtype)
    heads = tuned.heads_a_step(B, HV, K * V * dtype.itemsize)
    plan = Plan(scale, tuned.tokens, heads, tuned.compiler_params, tpu_per_channel if log_decay.ndim == 4 else tpu_per_head)

    log_decay = log_decay.astype(jnp.float32)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (B, T, HV))
    q, k = (jnp.repeat(x.astype(dtype), HV // q.shape[2], axis=2) for x in (q, k))
    if segments is not None:
        q, k, v, log_decay = (jnp.where(tpu_layout.like(segments.real, x), x, 0) for x in (q, k, v, log_decay))
        log_decay = jnp.where(tpu_layout.like(segments.starts, log_decay), RESET, log_decay)

    columns = partial(tpu_layout.columns, tokens=plan.tokens)
    log_decay = columns(log_decay) if log_decay.ndim == 4 else tpu_layout.rows(log_decay, plan.tokens, heads)
    state = tpu_layout.padded_state(initial_state)
    o, final_state = _run(plan, columns(q), columns(k), columns(v), log_decay, _oriented(plan, state))
    return o.reshape(B, o.shape[1], HV, -1)[:, :T, :, :V], _oriented(plan, final_state)[:, :, :K, :V]


def _oriented(plan, state):
    """[B,HV,K,V] as the kernels of the kind of decay have it, and back."""
    return jnp.swapaxes(state, 2, 3) if plan.kernels is tpu_per_channel else state


class Plan(NamedTuple):
    """scale; tokens: C; heads: G, that a step of the grid takes; compiler_params; kernels: the module of the kind of decay."""

    scale: float
    tokens: int
    heads: int
    compiler_params: pltpu.CompilerParams
    kernels: ModuleType


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, q, k, v, log_decay, initial_state):
    decays = plan.kernels.operands(plan, log_decay, v.dtype)
    return _forward_call(plan, q, k, v, decays, initial_state, keep=False)


def _run_forward(plan, q, k, v, log_decay, initial_state):
    decays = plan.kernels.operands(plan, log_decay, v.dtype)
    o, final_state, *kept = _forward_call(plan, q, k, v, decays, initial_state, keep=True)
    return (o, final_state), (q, k, v, decays, kept)


def _run_backward(plan, residuals, cotangents):
    return tuple(_backward_call(plan, *residuals, *cotangents))


_run.defvjp(_run_forward, _run_backward)


class _Blocks(NamedTuple):
    """The grid, and the block of each kind of array that a step of it works on; where ``reverse``, the last chunk comes first."""

    grid: tuple[int, int, int]
    keys: pl.BlockSpec  # [B,T,HV K]
    values: pl.BlockSpec  # [B,T,HV V]
    decays: tuple[pl.BlockSpec, ...]  # of the ``operands`` of the kind of decay: a head [B,HV/G,2G,T]; a channel as the keys, and constants
    d_decays: pl.BlockSpec  # a head: [B,HV/G,G,T]; a channel: as the keys
    state: pl.BlockSpec  # [B,HV,K,V]; for decays a channel [B,HV,V,K]
    kept: tuple[pl.BlockSpec, ...]  # the states before each chunk [B,N,HV,K,V] or [B,N,HV,V,K]; for decays a channel, the scores [B,T,HV C]

    @classmethod
    def of(cls, plan: Plan, q, v, decays, state_shape, reverse: bool) -> "_Blocks":
        C, G, (HV, *state) = plan.tokens, plan.heads, state_shape[-3:]
        (B, T, K), V = (*q.shape[:2], q.shape[2] // HV), v.shape[2] // HV
        N = T // C

        def at(n):
            return N - 1 - n if reverse else n

        def tokens(width):
            return pl.BlockSpec((1, C, G * width), lambda b, h, n: (b, at(n), h))

        def rows(count):
            return pl.BlockSpec((1, 1, count, C), lambda b, h, n: (b, h, 0, at(n)))

        per_channel = plan.kernels is tpu_per_channel
        states = pl.BlockSpec((1, 1, G, *state), lambda b, h, n: (b, at(n), h, 0, 0))
        return cls(
            grid=(B, HV // G, N),
            keys=tokens(K),
            values=tokens(V),
            decays=(tokens(K) if per_channel else rows(2 * G), *(pl.BlockSpec(x.shape, lambda b, h, n: (0, 0)) for x in decays[1:])),
            d_decays=tokens(K) if per_channel else rows(G),
            state=pl.BlockSpec((1, G, *state), lambda b, h, n: (b, h, 0, 0)),
            kept=(states, tokens(C)) if per_channel else (states,),
        )


def _forward_call(plan, q, k, v, decays, initial_state, keep: bool):
    """(o [B,T,HV V], the final state) and, if asked to keep it for the backward pass, in v's dtype, what :class:`_Blocks` has."""
    blocks = _Blocks.of(plan, q, v, decays, initial_state.shape, reverse=False)
    B, HV, *state = initial_state.shape
    kept = [(B, blocks.grid[2], HV, *state), (B, q.shape[1], HV * plan.tokens)][: len(blocks.kept) if keep else 0]
    kept = [jax.ShapeDtypeStruct(shape, v.dtype) for shape in kept]
    return platforms.pallas_call(
        partial(plan.kernels.forward, plan),
        name="gated_linear_attention_forward",
        grid=blocks.grid,
        in_specs=[blocks.keys, blocks.keys, blocks.values, *blocks.decays, blocks.state],
        out_specs=[blocks.values, blocks.state, *blocks.kept[: len(kept)]],
        out_shape=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(initial_state.shape, jnp.float32), *kept),
        compiler_params=plan.compiler_params,
        cost_estimate=tpu_layout.cost(plan.tokens, HV, (q, k, v, v, decays[0], *kept), products=(2, 2)),
    )(q, k, v, *decays, initial_state)


def _backward_call(plan, q, k, v, decays, kept, d_o, d_final_state):
    """The gradients of q, k, v, log_decay and the initial state."""
    blocks = _Blocks.of(plan, q, v, decays, d_final_state.shape, reverse=True)
    d_decays = decays[0] if plan.kernels is tpu_per_channel else decays[0][:, :, : plan.heads]
    return platforms.pallas_call(
        partial(plan.kernels.backward, plan),
        name="gated_linear_attention_backward",
        grid=blocks.grid,
        in_specs=[blocks.keys, blocks.keys, blocks.values, *blocks.decays, *blocks.kept, blocks.values, blocks.state],
        out_specs=[blocks.keys, blocks.keys, blocks.values, blocks.d_decays, blocks.state],
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, d_decays, d_final_state)),
        compiler_params=plan.compiler_params,
        cost_estimate=tpu_layout.cost(
            plan.tokens, d_final_state.shape[1], (q, k, v, *kept, v, q, k, v, d_decays, d_decays), products=(6, 4)
        ),
    )(q, k, v, *decays, *kept, d_o, d_final_state)
