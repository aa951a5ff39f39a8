"""Gated linear attention as Mosaic GPU kernels for Hopper, forward and backward: decays a head, in bfloat16.

With c_i the sum of the log decays in a chunk of C tokens up to and with token i, and S the state before the chunk,

    o_i = scale * (sum_{j<=i} (q_i . k_j) exp(c_i - c_j) v_j + exp(c_i) S^T q_i)     S' = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

Two kernels are all there is, each used forward and backward in time: :mod:`.gpu_states` walks the states through the chunks and
writes them out in bfloat16, :mod:`.gpu_reads` computes from them all chunks' outputs, or gradients, at once. A new document is a log
decay of RESET at its first token, which no state survives; padding has neither keys nor decay.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.gpu_layout import TILE
from pallas_kernels.gated_linear_attention.gpu_reads import Read, reads
from pallas_kernels.gated_linear_attention.gpu_states import states
from pallas_kernels.gated_linear_attention.tpu_decays import RESET, running_sums
from pallas_kernels.gated_linear_attention.tpu_layout import like
from pallas_kernels.segments import Segments

CHUNK = 128  # of 64 and 128 tokens, the one with half the states to write and read


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> bool:
    """Whether to take this kernel on Hopper for such arrays: bfloat16, a decay a head, and heads of a multiple of 64."""
    return _refusal(q, k, v, log_decay) is None


def _refusal(q, k, v, log_decay):
    """What is wrong with the arguments for this kernel, or None."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}, needs bfloat16"
        if x.ndim == 4 and x.shape[3] % TILE:
            return f"{name} has shape {x.shape}, needs heads whose size is a multiple of {TILE}"
    if log_decay.ndim == 4:
        return f"log_decay has shape {log_decay.shape}, needs one decay a head"
    return None


def gated_linear_attention(q, k, v, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in bfloat16, the final state [B,HV,K,V] in float32).

    Raises ValueError for dtypes and sizes that the kernels do not take.
    """
    if refusal := _refusal(q, k, v, log_decay):
        raise ValueError(f"gated_linear_attention: {refusal} for implementation='pallas' on a Hopper GPU; choose 'xla'")
    B, T, HV, _ = v.shape
    log_decay = log_decay.astype(jnp.float32)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (B, T, HV))
    if segments is not None:
        q, k, v, log_decay = (jnp.where(like(segments.real, x), x, 0) for x in (q, k, v, log_decay))
        log_decay = jnp.where(like(segments.starts, log_decay), RESET, log_decay)
    q, k, v, log_decay = (jnp.pad(x, [(0, 0), (0, -T % CHUNK)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, log_decay))
    o, final_state = _run(scale, q, k, v, jnp.moveaxis(log_decay, 1, 2), initial_state.astype(jnp.float32))
    return o[:, :T], final_state


class Kept(NamedTuple):
    """What the backward pass needs. sums: [B,HV,2,T] float32. states: before each chunk, [B,N,HV,K,V] bfloat16."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sums: jax.Array
    states: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(scale, q, k, v, log_decay, initial_state):
    return _run_forward(scale, q, k, v, log_decay, initial_state)[0]


def _run_forward(scale, q, k, v, log_decay, initial_state):
    sums = running_sums(jnp.maximum(log_decay, RESET)[:, :, None], CHUNK)
    final_state, before = states(k, v, sums, initial_state, chunk=CHUNK, reverse=False)
    kept = Kept(q, k, v, sums, before)
    (o,) = reads((Read("q", "k", "v", "states"),), {"q": q, "k": k, "v": v, "states": before}, sums, chunk=CHUNK, scale=scale)
    return (o, final_state), kept


GRADIENTS = (
    Read("d_o", "v", "k", "states", transposed=True, itself="q"),
    Read("v", "d_o", "q", "d_states", transposed=True, reverse=True, itself="k"),
    Read("k", "q", "d_o", "d_states", reverse=True),
)


def _run_backward(scale, kept, cotangents):
    d_o, d_final_state = cotangents
    d_initial_state, after = states(kept.q, d_o, kept.sums, d_final_state, chunk=CHUNK, reverse=True, scale=scale)
    operands = {"q": kept.q, "k": kept.k, "v": kept.v, "d_o": d_o, "states": kept.states, "d_states": after}
    d_q, of_q, d_k, of_k, d_v = reads(GRADIENTS, operands, kept.sums, chunk=CHUNK, scale=scale)
    d_log_decay = _d_log_decay(jnp.sum(of_q, axis=2), jnp.sum(of_k, axis=2), kept, after)
    return _summed(d_q, kept.q), _summed(d_k, kept.k), d_v, d_log_decay, d_initial_state


_run.defvjp(_run_forward, _run_backward)


def _d_log_decay(of_q, of_k, kept, after):
    """[B,HV,T] of the products [B,HV,2,T] of q and k with their gradients through the state and through the chunk.

    Of the log decay of token t: the reads of the state from t on, every pair j < t <= i, the writes to the state before t, and the
    state itself. Pairs on one side of t are in both sums of their difference; a token with itself is in neither.
    """
    (B, HV, _, T), N = of_q.shape, kept.states.shape[1]
    from_t = (of_q[:, :, 0] + of_q[:, :, 1] - of_k[:, :, 1]).reshape(B, HV, N, CHUNK)
    writes = of_k[:, :, 0].reshape(B, HV, N, CHUNK)
    before = jnp.tri(CHUNK, k=-1)  # [t, j]: j < t
    sums = jnp.einsum("ij,bhni->bhnj", 1 - before.T, from_t, precision=jax.lax.Precision.HIGHEST)
    sums += jnp.einsum("tj,bhnj->bhnt", before, writes, precision=jax.lax.Precision.HIGHEST)
    total = jnp.exp(jnp.sum(kept.sums[..., CHUNK - 1 :: CHUNK], axis=2))
    through = total * jnp.einsum("bnhkv,bnhkv->bhn", kept.states, after, preferred_element_type=jnp.float32)
    return (sums + through[..., None]).reshape(B, HV, T)


def _summed(d, x):
    """The gradient by a head of x [B,T,H,K], of those [B,T,HV,K] through each value head that reads it."""
    return jnp.sum(d.reshape(*x.shape[:3], -1, x.shape[3]), axis=3, dtype=jnp.float32).astype(x.dtype)
