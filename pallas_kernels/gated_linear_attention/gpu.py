"""Gated linear attention as Mosaic GPU kernels for Hopper, forward and backward, in bfloat16.

With c_i the sum of the log decays in a chunk of C tokens up to and with token i, and S the state before the chunk,

    o_i = scale * (sum_{j<=i} (q_i . k_j) exp(c_i - c_j) v_j + exp(c_i) S^T q_i)     S' = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

where a decay is one number, :mod:`.gpu_per_head`, or one a channel of k, :mod:`.gpu_per_channel`. For either :mod:`.gpu_walk` takes the
state through the chunks in registers, forwards for o and backwards for the gradient of v, and writes it down in bfloat16 only for the
gradients of q, k and the decays, which are of all chunks at once. A new document is a log decay of RESET at its first token, which no
state survives; padding has neither keys nor decay.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention import gpu_per_channel, gpu_per_head
from pallas_kernels.gated_linear_attention.gpu_layout import TILE
from pallas_kernels.gated_linear_attention.tpu_decays import RESET
from pallas_kernels.gated_linear_attention.tpu_layout import like
from pallas_kernels.segments import Segments

KEYS = 256  # of a head, at most: two chunks of q and k are in shared memory


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> bool:
    """Whether to take this kernel on Hopper for such arrays: bfloat16, heads of a multiple of 64, of keys at most 256."""
    return _refusal(q, k, v) is None


def _refusal(q, k, v):
    """What is wrong with the arguments for this kernel, or None."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}, needs bfloat16"
        if x.shape[3] % TILE:
            return f"{name} has shape {x.shape}, needs heads whose size is a multiple of {TILE}"
    if k.shape[3] > KEYS:
        return f"k has shape {k.shape}, needs heads of at most {KEYS}"
    return None


def gated_linear_attention(q, k, v, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in bfloat16, the final state [B,HV,K,V] in float32).

    Raises ValueError for dtypes and sizes that the kernels do not take.
    """
    if refusal := _refusal(q, k, v):
        raise ValueError(f"gated_linear_attention: {refusal} for implementation='pallas' on a Hopper GPU; choose 'xla'")
    B, T, HV, _ = v.shape
    kernels = gpu_per_channel if log_decay.ndim == 4 else gpu_per_head
    log_decay = log_decay.astype(jnp.float32)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (B, T, HV))
    if segments is not None:
        q, k, v, log_decay = (jnp.where(like(segments.real, x), x, 0) for x in (q, k, v, log_decay))
        log_decay = jnp.where(like(segments.starts, log_decay), RESET, log_decay)
    padding = -T % kernels.CHUNK
    q, k, v, log_decay = (jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, log_decay))
    o, final_state = kernels.run(scale, q, k, v, log_decay, initial_state.astype(jnp.float32))
    return o[:, :T], final_state
