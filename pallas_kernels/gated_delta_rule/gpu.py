"""The gated delta rule as Mosaic GPU kernels for Hopper, forward and backward, for decays a channel, a head, or none.

A chunk of C = 64 tokens that starts from the state S is, with c_i the sum of the log decays up to and with token i and
E_ij = exp(c_i - c_j),

    e = X (v - exp(c) k S)        X = (I + A)^-1        A_ij = (k_i . k_j) E_ij beta_j for j < i
    o_i = scale * (sum_{j<=i} (q_i . k_j) E_ij beta_j e_j + exp(c_i) q_i S)        S' = exp(c_C) S + sum_j exp(c_C - c_j) beta_j k_j e_j^T

as in :mod:`.tpu`, by kernels that walk through the chunks with the state in registers (:mod:`.gpu_forward`, :mod:`.gpu_backward`) and such
that take all chunks at once, before the walks and after them: for decays a head those of :mod:`.gpu_per_head`; where c_i has a part a
channel, exp(c_i - c_j) stands inside of the products over channels, and :mod:`.gpu_per_channel` has them. For the backward pass forward
keeps what it made of all chunks at once; states and e are computed again. A new document is a log decay of RESET at its first token.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import gpu_backward, gpu_forward, gpu_per_channel, gpu_per_head, gpu_pieces
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, COLUMNS
from pallas_kernels.gated_linear_attention.tpu_decays import RESET
from pallas_kernels.gated_linear_attention.tpu_layout import like
from pallas_kernels.segments import Segments

KEYS = (64, 128, 256)  # the head sizes K that the kernels take
KEYS_PER_CHANNEL = (64, 128)
WARPGROUPS = 2 * 132  # of walks that an H100 or H200 runs at once: two a multiprocessor
LEAST = 8  # chunks a piece


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None) -> bool:
    """Whether the kernels take such arrays: the XLA form is left all others."""
    return not _needs(q, k, v, log_decay)


def _needs(q, k, v, log_decay) -> list[str]:
    """What of :func:`gated_delta_rule`'s needs the arrays do not meet."""
    K, V = k.shape[3], v.shape[3]
    needs = [f"{name} in bfloat16, not {x.dtype}" for name, x in (("q", q), ("k", k), ("v", v)) if x.dtype != jnp.bfloat16]
    per_channel = log_decay is not None and log_decay.ndim == 4
    sizes, which = (KEYS_PER_CHANNEL, " with a log_decay a channel") if per_channel else (KEYS, "")
    if K not in sizes:
        needs.append(f"keys of {', '.join(map(str, sizes))} channels{which}, not {K}")
    if V % COLUMNS:
        needs.append(f"values of a multiple of {COLUMNS} channels, not {V}")
    if jax.config.jax_enable_x64:  # Python's integers in a kernel would be of 64 bits, which the grid's are not
        needs.append("jax_enable_x64 off")
    return needs


def gated_delta_rule(q, k, v, beta, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in bfloat16, the final state [B,HV,K,V] in float32).

    Raises ValueError for q, k or v not in bfloat16, for head sizes other than K in KEYS, with decays a channel in KEYS_PER_CHANNEL, and
    V a multiple of 64, and with 64-bit types enabled.
    """
    if needs := _needs(q, k, v, log_decay):
        raise ValueError(f"gated_delta_rule: implementation='pallas' needs on this GPU {' and '.join(needs)}; choose 'xla'")
    B, T, HV, V = v.shape
    N = -(-T // CHUNK)
    log_decay = jnp.zeros_like(beta, jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    beta = beta.astype(jnp.float32)
    per_channel = log_decay.ndim == 4
    plan = Plan.of(scale, HV // q.shape[2], per_channel, B * HV * V // COLUMNS, N, even=V % (2 * COLUMNS) == 0)

    if segments is not None:
        log_decay = jnp.where(like(segments.starts, log_decay), RESET, log_decay)
        q, k, v, beta, log_decay = (jnp.where(like(segments.real, x), x, 0) for x in (q, k, v, beta, log_decay))
    if T % CHUNK:
        q, k, v, beta, log_decay = (jnp.pad(x, [(0, 0), (0, -T % CHUNK)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, beta, log_decay))

    def by_chunks(x):
        return jnp.swapaxes(x, 1, 2).reshape(B, HV, N, CHUNK)

    state = jnp.swapaxes(initial_state.astype(jnp.float32), 2, 3)
    o, final_state = _run(plan, q, k, v, by_chunks(beta), log_decay if per_channel else by_chunks(log_decay), state)
    return o[:, :T], jnp.swapaxes(final_state, 2, 3)


class Plan(NamedTuple):
    """scale; groups: value heads to a head of keys; per_channel: the kind of decay; pieces of the sequence, so many chunks each; the
    warpgroups of a walk's CTA and the chunks that its shared memory holds."""

    scale: float
    groups: int
    per_channel: bool
    pieces: int
    chunks: int
    warpgroups: int
    stages: int = 2

    def keeping(self, K: int) -> "Plan":
        """For a walk that writes the states down: of 256 keys, registers and shared memory hold one warpgroup's."""
        return self._replace(warpgroups=1) if K > 128 else self

    @classmethod
    def of(cls, scale, groups, per_channel, walks, N, even) -> "Plan":
        """For so many ``walks`` of a warpgroup through all N chunks; ``even`` where a head has two or four.

        In pieces all chunks are walked through twice more, with half of the work each time: two pieces would gain nothing.
        """
        pieces = min(WARPGROUPS // walks, N // LEAST)
        pieces = pieces if pieces > 2 else 1
        chunks = -(-N // pieces)
        pieces = -(-N // chunks)
        return cls(scale, groups, per_channel, pieces, chunks, warpgroups=2 if even and walks * pieces > WARPGROUPS // 2 else 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, q, k, v, beta, log_decay, initial_state):
    return _run_forward(plan, q, k, v, beta, log_decay, initial_state)[0]


def _run_forward(plan, q, k, v, beta, log_decay, initial_state):
    """beta [B,HV,N,C], log_decay the same or [B,T,HV,K], initial_state [B,HV,V,K].

    Returns (o and the final state), and what the backward pass takes.
    """
    decays = gpu_per_channel if plan.per_channel else gpu_per_head
    inverse, kept = decays.forward(plan, q, k, beta, log_decay)
    keys = kept.keys(q, k)
    if plan.pieces == 1:
        transitions, before = None, initial_state[:, :, None]
    else:
        transitions = gpu_forward.transitions(plan, keys, inverse, _identities(plan, initial_state))
        increments = gpu_forward.increments(plan, keys, v, inverse, _zeros(plan, initial_state))
        before = gpu_pieces.starts(transitions, increments, initial_state)
    o, after = gpu_forward.outputs(plan, keys, v, inverse, kept.scores, before)
    return (o, after[:, :, -1]), (q, k, v, inverse, kept, transitions, before)


def _run_backward(plan, residuals, cotangents):
    q, k, v, inverse, kept, transitions, before = residuals
    d_o, d_final_state = cotangents
    keys, scores = kept.keys(q, k), kept.scores
    d_after = d_final_state[:, :, None]
    if plan.pieces > 1:
        increments = gpu_backward.increments(plan, keys, inverse, scores, d_o, _zeros(plan, d_final_state))
        d_after = gpu_pieces.starts(transitions, increments, d_final_state, backwards=True)
    d_v, d_states, d_before = gpu_backward.states(plan, keys, inverse, scores, d_o, d_after)
    states, errors, _ = gpu_forward.states(plan, keys, v, inverse, before)
    d_q, d_k, *d_gates = kept.gradients(plan, q, k, states, errors, d_o, d_v, d_states)
    d_q, d_k = (_sum_of_groups(x, plan.groups) for x in (d_q, d_k))
    return d_q, d_k, d_v, *d_gates, d_before[:, :, 0]


_run.defvjp(_run_forward, _run_backward)


def _zeros(plan, state):
    """[B,HV,V,K] -> [B,HV,pieces,V,K]."""
    B, HV, V, K = state.shape
    return jnp.zeros_like(state, shape=(B, HV, plan.pieces, V, K))


def _identities(plan, state):
    """[B,HV,V,K] -> [B,HV,pieces,K,K]."""
    B, HV, _, K = state.shape
    return jnp.zeros_like(state, shape=(B, HV, plan.pieces, K, K)) + jnp.eye(K)


def _sum_of_groups(x, groups: int):
    """[B,T,HV,K] -> [B,T,H,K]."""
    if groups == 1:
        return x
    B, T, HV, K = x.shape
    return jnp.sum(x.reshape(B, T, HV // groups, groups, K), axis=3, dtype=jnp.float32).astype(x.dtype)
