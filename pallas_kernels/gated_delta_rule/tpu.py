"""The gated delta rule with one decay a head, or none, as Mosaic TPU kernels, forward and backward.

The grid is (B, groups of heads, chunks of T); chunks run in order, the states of a group's heads in VMEM between them. A chunk of
C tokens that starts from the state S, with c_i the sum of the log decays up to and with token i and E_ij = exp(c_i - c_j), is

    e = X (v - exp(c) S^T k)        X = (I + A)^-1        A_ij = (k_i . k_j) E_ij beta_j for j < i
    o_i = scale * (sum_{j<=i} (q_i . k_j) E_ij beta_j e_j + exp(c_i) S^T q_i)        S' = exp(c_C) S + sum_j exp(c_C - c_j) beta_j k_j e_j^T

Here e_i, what the state before token i gets wrong about v_i, stands for the updates u_i = beta_i e_i of :mod:`.chunk`: so beta is only
ever a factor of columns, which costs no broadcast. For the backward pass forward keeps, in the operands' dtype, the state before each
chunk, e and X. Decays are those of :mod:`pallas_kernels.gated_linear_attention.tpu`: sums in two parts, and RESET at a document's start.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import checks, platforms
from pallas_kernels.gated_delta_rule import tpu_backward, tpu_forward
from pallas_kernels.gated_delta_rule.tpu_gates import HEADS
from pallas_kernels.gated_linear_attention.tpu import Blocking
from pallas_kernels.gated_linear_attention.tpu_decays import LANES, RESET, running_sums
from pallas_kernels.segments import Segments

# Within the VMEM of all generations; those tuned, for bfloat16, within that of their own.
DEFAULT = Blocking(tokens=128, heads=4, state_bytes=2**18)
LARGER = Blocking(tokens=128, heads=8, state_bytes=2**19)
TUNED = {"v5e": LARGER, "v5p": LARGER, "tpu7x": LARGER, "v6e": LARGER}


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None) -> bool:
    """Whether this kernel is the fastest measured implementation on TPU for such arrays."""
    arrays = (q, k, v, beta) if log_decay is None else (q, k, v, beta, log_decay)
    return (log_decay is None or log_decay.ndim < 4) and all(x.dtype in checks.KERNEL_DTYPES for x in arrays)


def gated_delta_rule(q, k, v, beta, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in v's dtype, the final state [B,HV,K,V] in float32).

    Matrix products take operands in v's dtype. Raises ValueError for decays a channel, and dtypes other than float32 and bfloat16.
    """
    if log_decay is None:
        log_decay = jnp.zeros_like(beta, dtype=jnp.float32)
    if log_decay.ndim == 4:
        raise ValueError("gated_delta_rule: log_decay is [B,T,HV,K], implementation='pallas' needs [B,T,HV], [HV] or None")
    checks.check_kernel_dtypes("gated_delta_rule", q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    B, T, HV, V = v.shape
    K, dtype = q.shape[3], v.dtype
    blocking = TUNED.get(platforms.generation(), DEFAULT) if dtype == jnp.bfloat16 else DEFAULT
    heads = blocking.heads_a_step(B, HV, K * V * dtype.itemsize)

    beta, log_decay = beta.astype(jnp.float32), log_decay.astype(jnp.float32)
    q, k = (jnp.repeat(x.astype(dtype), HV // q.shape[2], axis=2) for x in (q, k))
    if segments is not None:
        log_decay = jnp.where(segments.starts[..., None], RESET, log_decay)
        q, k, v, beta, log_decay = (jnp.where(segments.real.reshape(B, T, *[1] * (x.ndim - 2)), x, 0) for x in (q, k, v, beta, log_decay))

    def columns(x, width):  # [B,T,HV,width] -> [B,N C,HV W], W whole registers
        x = jnp.pad(x, [(0, 0), (0, -T % blocking.tokens), (0, 0), (0, -width % LANES)])
        return x.reshape(*x.shape[:2], -1)

    def rows(x):  # [B,T,HV] -> [B,HV/G,G,N C]
        x = jnp.pad(x, [(0, 0), (0, -T % blocking.tokens), (0, 0)])
        return jnp.moveaxis(x, 1, 2).reshape(B, HV // heads, heads, -1)

    state = jnp.pad(initial_state.astype(jnp.float32), [(0, 0), (0, 0), (0, -K % LANES), (0, -V % LANES)])
    plan = Plan(scale, blocking.tokens, heads)
    gates = rows(beta), rows(jnp.maximum(log_decay, RESET))
    o, final_state = _run(plan, columns(q, K), columns(k, K), columns(v, V), *gates, state)
    return o.reshape(B, o.shape[1], HV, -1)[:, :T, :, :V], final_state[:, :, :K, :V]


class Plan(NamedTuple):
    """scale; tokens: C; heads: G, that a step of the grid takes."""

    scale: float
    tokens: int
    heads: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, q, k, v, beta, log_decay, initial_state):
    return _forward_call(plan, q, k, v, _gates(plan, beta, log_decay), initial_state, keep=False)


def _run_forward(plan, q, k, v, beta, log_decay, initial_state):
    gates = _gates(plan, beta, log_decay)
    o, final_state, *kept = _forward_call(plan, q, k, v, gates, initial_state, keep=True)
    return (o, final_state), (q, k, v, gates, *kept)


def _gates(plan, beta, log_decay):
    """beta, log_decay [B,HV/G,G,T] -> [B,HV/G,3*8,T]: beta and both parts of the running sums, each padded to 8 heads."""
    gates = jnp.concatenate([beta, running_sums(log_decay, plan.tokens)], axis=2)
    gates = gates.reshape(*gates.shape[:2], 3, plan.heads, -1)
    gates = jnp.pad(gates, [(0, 0)] * 3 + [(0, HEADS - plan.heads), (0, 0)])
    return gates.reshape(*gates.shape[:2], 3 * HEADS, -1)


def _run_backward(plan, residuals, cotangents):
    d_q, d_k, d_v, d_gates, d_initial_state = _backward_call(plan, *residuals, *cotangents)
    return d_q, d_k, d_v, *jnp.split(d_gates, 2, axis=2), d_initial_state


_run.defvjp(_run_forward, _run_backward)


class _Blocks(NamedTuple):
    """The grid, and the block of each kind of array that a step of it works on; where ``reverse``, the last chunk comes first."""

    grid: tuple[int, int, int]
    keys: pl.BlockSpec  # [B,T,HV K]
    values: pl.BlockSpec  # [B,T,HV V]
    gates: pl.BlockSpec  # [B,HV/G,3*8,T]
    d_gates: pl.BlockSpec  # [B,HV/G,2G,T]
    state: pl.BlockSpec  # [B,HV,K,V]
    states: pl.BlockSpec  # [B,N,HV,K,V]
    inverses: pl.BlockSpec  # [B,N,HV,C,C]

    @classmethod
    def of(cls, plan: Plan, q, state_shape, reverse: bool) -> "_Blocks":
        C, G, (HV, K, V) = plan.tokens, plan.heads, state_shape[-3:]
        N = q.shape[1] // C

        def at(n):
            return N - 1 - n if reverse else n

        return cls(
            (q.shape[0], HV // G, N),
            pl.BlockSpec((1, C, G * K), lambda b, h, n: (b, at(n), h)),
            pl.BlockSpec((1, C, G * V), lambda b, h, n: (b, at(n), h)),
            pl.BlockSpec((1, 1, 3 * HEADS, C), lambda b, h, n: (b, h, 0, at(n))),
            pl.BlockSpec((1, 1, 2 * G, C), lambda b, h, n: (b, h, 0, at(n))),
            pl.BlockSpec((1, G, K, V), lambda b, h, n: (b, h, 0, 0)),
            pl.BlockSpec((1, 1, G, K, V), lambda b, h, n: (b, at(n), h, 0, 0)),
            pl.BlockSpec((1, 1, G, C, C), lambda b, h, n: (b, at(n), h, 0, 0)),
        )


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _forward_call(plan, q, k, v, gates, initial_state, keep: bool):
    """(o [B,T,HV V], the final state [B,HV,K,V]) and, if asked to keep them for the backward pass, in v's dtype,
    the states before each chunk [B,N,HV,K,V], e [B,T,HV V] and X [B,N,HV,C,C]."""
    blocks = _Blocks.of(plan, q, initial_state.shape, reverse=False)
    (B, HV, K, V), C = initial_state.shape, plan.tokens
    shapes = [v.shape, initial_state.shape, (B, blocks.grid[2], HV, K, V), v.shape, (B, blocks.grid[2], HV, C, C)]
    dtypes = [v.dtype, jnp.float32, v.dtype, v.dtype, v.dtype]
    specs = [blocks.values, blocks.state, blocks.states, blocks.values, blocks.inverses]
    results = slice(None) if keep else slice(2)
    out_shape = tuple(map(jax.ShapeDtypeStruct, shapes[results], dtypes[results]))
    return platforms.pallas_call(
        partial(tpu_forward.kernel, plan),
        name="gated_delta_rule_forward",
        grid=blocks.grid,
        in_specs=[blocks.keys, blocks.keys, blocks.values, blocks.gates, blocks.state],
        out_specs=specs[results],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((plan.heads, K, V), jnp.float32)],
        compiler_params=_PARAMS,
        cost_estimate=_cost(plan, K, (q, k, v, *out_shape), products=(6, 3)),
    )(q, k, v, gates, initial_state)


def _backward_call(plan, q, k, v, gates, states, errors, inverses, d_o, d_final_state):
    """The gradients of q, k, v, the gates (beta and log_decay, [B,HV/G,2G,T]) and the initial state."""
    blocks = _Blocks.of(plan, q, states.shape, reverse=True)
    B, groups, _, T = gates.shape
    K, V = states.shape[3:]
    d_gates = jax.ShapeDtypeStruct((B, groups, 2 * plan.heads, T), jnp.float32)
    return platforms.pallas_call(
        partial(tpu_backward.kernel, plan),
        name="gated_delta_rule_backward",
        grid=blocks.grid,
        in_specs=[
            *(blocks.keys, blocks.keys, blocks.values, blocks.gates),
            *(blocks.states, blocks.values, blocks.inverses, blocks.values, blocks.state),
        ],
        out_specs=[blocks.keys, blocks.keys, blocks.values, blocks.d_gates, blocks.state],
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, d_gates, d_final_state)),
        scratch_shapes=[pltpu.VMEM((plan.heads, K, V), jnp.float32)],
        compiler_params=_PARAMS,
        cost_estimate=_cost(plan, K, (q, k, v, q, k, v, v, v, states, inverses), products=(11, 6)),
    )(q, k, v, gates, states, errors, inverses, d_o, d_final_state)


def _cost(plan, K, moved, products) -> pl.CostEstimate:
    """``products``: how many are over pairs of tokens, and how many meet the state; XLA's own estimates take it from here."""
    (B, T, width), v, (pairs, meetings) = moved[0].shape, moved[2], products
    return pl.CostEstimate(
        flops=2 * B * T * v.shape[2] * (pairs * plan.tokens + meetings * K),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        transcendentals=B * T * (width // K) * plan.tokens,
    )
