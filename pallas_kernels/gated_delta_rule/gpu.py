"""The gated delta rule as Mosaic GPU kernels for Hopper, forward and backward, for decays a head or none.

A chunk of C = 64 tokens that starts from the state S is, with c_i the sum of the log decays up to and with token i and
E_ij = exp(c_i - c_j),

    e = X (v - exp(c) k S)        X = (I + A)^-1        A_ij = (k_i . k_j) E_ij beta_j for j < i
    o_i = scale * (sum_{j<=i} (q_i . k_j) E_ij beta_j e_j + exp(c_i) q_i S)        S' = exp(c_C) S + sum_j exp(c_C - c_j) beta_j k_j e_j^T

as in :mod:`.tpu`, by kernels that take all chunks at once (:mod:`.gpu_pairs`, :mod:`.gpu_gradients`) and such that walk through them with
the state in registers (:mod:`.gpu_forward`, :mod:`.gpu_backward`). For the backward pass forward keeps X; states and e are computed again.
Decays are those of :mod:`pallas_kernels.gated_linear_attention.tpu`: sums in two parts, and RESET at a document's start.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import gpu_backward, gpu_forward, gpu_gradients, gpu_pairs, gpu_pieces
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, COLUMNS, Gate
from pallas_kernels.gated_delta_rule.gpu_gradients import Sum
from pallas_kernels.gated_linear_attention.tpu_decays import RESET
from pallas_kernels.segments import Segments

KEYS = (64, 128, 256)  # the head sizes K that the kernels take
WARPGROUPS = 2 * 132  # of walks that an H100 or H200 runs at once: two a multiprocessor
LEAST = 8  # chunks a piece


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None) -> bool:
    """Whether the kernels take such arrays: the XLA form is left all others."""
    return not _needs(q, k, v, log_decay)


def _needs(q, k, v, log_decay) -> list[str]:
    """What of :func:`gated_delta_rule`'s needs the arrays do not meet."""
    K, V = k.shape[3], v.shape[3]
    needs = [f"{name} in bfloat16, not {x.dtype}" for name, x in (("q", q), ("k", k), ("v", v)) if x.dtype != jnp.bfloat16]
    if K not in KEYS:
        needs.append(f"keys of {', '.join(map(str, KEYS))} channels, not {K}")
    if V % COLUMNS:
        needs.append(f"values of a multiple of {COLUMNS} channels, not {V}")
    if log_decay is not None and log_decay.ndim == 4:
        needs.append("a log_decay a head [B,T,HV] or [HV], or None, not one a channel")
    return needs


def gated_delta_rule(q, k, v, beta, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in bfloat16, the final state [B,HV,K,V] in float32).

    Raises ValueError for q, k or v not in bfloat16, for decays a channel and for head sizes other than K in KEYS and V a multiple of 64.
    """
    if needs := _needs(q, k, v, log_decay):
        raise ValueError(f"gated_delta_rule: implementation='pallas' needs on this GPU {' and '.join(needs)}; choose 'xla'")
    B, T, HV, V = v.shape
    N = -(-T // CHUNK)
    plan = Plan.of(scale, HV // q.shape[2], B * HV * V // COLUMNS, N, even=V % (2 * COLUMNS) == 0)

    log_decay = jnp.zeros_like(beta, jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    beta = beta.astype(jnp.float32)
    if segments is not None:
        log_decay = jnp.where(segments.starts[..., None], RESET, log_decay)
        q, k, v = (jnp.where(segments.real[..., None, None], x, 0) for x in (q, k, v))
        beta, log_decay = (jnp.where(segments.real[..., None], x, 0) for x in (beta, log_decay))
    if T % CHUNK:
        q, k, v, beta, log_decay = (jnp.pad(x, [(0, 0), (0, -T % CHUNK)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, beta, log_decay))
    beta, log_decay = (jnp.swapaxes(x, 1, 2).reshape(B, HV, N, CHUNK) for x in (beta, log_decay))
    state = jnp.swapaxes(initial_state.astype(jnp.float32), 2, 3)
    o, final_state = _run(plan, q, k, v, beta, jnp.maximum(log_decay, RESET), state)
    return o[:, :T], jnp.swapaxes(final_state, 2, 3)


class Plan(NamedTuple):
    """scale; groups: value heads to a head of keys; pieces of the sequence, so many chunks each; the warpgroups of a walk's CTA and the
    chunks that its shared memory holds."""

    scale: float
    groups: int
    pieces: int
    chunks: int
    warpgroups: int
    stages: int = 2

    def keeping(self, K: int) -> "Plan":
        """For a walk that writes the states down: of 256 keys, registers and shared memory hold one warpgroup's."""
        return self._replace(warpgroups=1) if K > 128 else self

    @classmethod
    def of(cls, scale, groups, walks, N, even) -> "Plan":
        """For so many ``walks`` of a warpgroup through all N chunks; ``even`` where a head has two or four.

        In pieces all chunks are walked through twice more, with half of the work each time: two pieces would gain nothing.
        """
        pieces = min(WARPGROUPS // walks, N // LEAST)
        pieces = pieces if pieces > 2 else 1
        chunks = -(-N // pieces)
        pieces = -(-N // chunks)
        return cls(scale, groups, pieces, chunks, warpgroups=2 if even and walks * pieces > WARPGROUPS // 2 else 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, q, k, v, beta, log_decay, initial_state):
    return _run_forward(plan, q, k, v, beta, log_decay, initial_state)[0]


def _run_forward(plan, q, k, v, beta, log_decay, initial_state):
    """beta, log_decay [B,HV,N,C], initial_state [B,HV,V,K] -> o and the final state, and what the backward pass takes."""
    gates = _gates(beta, log_decay)
    scores, inverse = gpu_pairs.with_inverse(plan, q, k, gates)
    if plan.pieces == 1:
        transitions, before = None, initial_state[:, :, None]
    else:
        transitions = gpu_forward.transitions(plan, k, gates, inverse, _identities(plan, initial_state))
        increments = gpu_forward.increments(plan, k, v, gates, inverse, _zeros(plan, initial_state))
        before = gpu_pieces.starts(transitions, increments, initial_state)
    o, after = gpu_forward.outputs(plan, q, k, v, gates, inverse, scores, before)
    return (o, after[:, :, -1]), (q, k, v, gates, inverse, transitions, before)


def _run_backward(plan, residuals, cotangents):
    q, k, v, gates, inverse, transitions, before = residuals
    d_o, d_final_state = cotangents
    scores, lower = gpu_pairs.without_inverse(plan, q, k, gates)
    d_after = d_final_state[:, :, None]
    if plan.pieces > 1:
        increments = gpu_backward.increments(plan, q, k, gates, inverse, scores, d_o, _zeros(plan, d_final_state))
        d_after = gpu_pieces.starts(transitions, increments, d_final_state, backwards=True)
    d_v, d_states, d_before = gpu_backward.states(plan, q, k, gates, inverse, scores, d_o, d_after)
    states, errors, _ = gpu_forward.states(plan, k, v, gates, inverse, before)
    d_q, d_k, sums = gpu_gradients.gradients(plan, q, k, gates, scores, lower, states, errors, d_o, d_v, d_states)
    d_q, d_k = (_sum_of_groups(x, plan.groups) for x in (d_q, d_k))
    return d_q, d_k, d_v, *_d_gates(gates, sums), d_before[:, :, 0]


_run.defvjp(_run_forward, _run_backward)


def _zeros(plan, state):
    """[B,HV,V,K] -> [B,HV,pieces,V,K]."""
    B, HV, V, K = state.shape
    return jnp.zeros_like(state, shape=(B, HV, plan.pieces, V, K))


def _identities(plan, state):
    """[B,HV,V,K] -> [B,HV,pieces,K,K]."""
    B, HV, _, K = state.shape
    return jnp.zeros_like(state, shape=(B, HV, plan.pieces, K, K)) + jnp.eye(K)


def _gates(beta, log_decay):
    """The rows of :class:`.gpu_chunk.Gate`, [B,HV,N,GATES,C]."""
    coarse = jnp.round(log_decay * 16) / 16
    upper = jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.float32))
    coarse, fine = (jnp.einsum("bhnt,ti->bhni", x, upper, precision=jax.lax.Precision.HIGHEST) for x in (coarse, log_decay - coarse))
    until_end = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
    return jnp.stack([beta, jnp.exp(coarse + fine), until_end, coarse, fine], axis=3)


def _d_gates(gates, sums):
    """The gradients of beta and log_decay [B,HV,N,C] by the sums of :class:`.gpu_gradients.Sum`, [B,HV,N,parts,SUMS,C].

    A log decay is in every pair j < t <= i, in the reads of the state from t on, in the writes to it before t, and in the state's own.
    """
    beta, total = gates[..., Gate.BETA, :], gates[..., Gate.SINCE_START, -1:]
    pairs, sums = sums[:, :, :, 0], jnp.sum(sums, axis=3)
    earlier, later, itself = (pairs[..., row, :] for row in (Sum.EARLIER, Sum.LATER, Sum.ITSELF))
    reads, writes, state = (sums[..., row, :] for row in (Sum.READS, Sum.WRITES, Sum.STATE))
    d_beta = later + itself + writes
    from_here = jnp.cumsum((earlier - beta * later + reads)[..., ::-1], axis=-1)[..., ::-1]
    before = jnp.cumsum(jnp.pad((beta * writes)[..., :-1], [(0, 0)] * 3 + [(1, 0)]), axis=-1)  # not less itself: that would cancel
    return d_beta, from_here + before + total * jnp.sum(state, axis=-1, keepdims=True)


def _sum_of_groups(x, groups: int):
    """[B,T,HV,K] -> [B,T,H,K]."""
    if groups == 1:
        return x
    B, T, HV, K = x.shape
    return jnp.sum(x.reshape(B, T, HV // groups, groups, K), axis=3, dtype=jnp.float32).astype(x.dtype)
