"""Gated linear attention on Hopper with a decay a head: two kernels, each used forward and backward in time. See :mod:`.gpu`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.gpu_layout import summed
from pallas_kernels.gated_linear_attention.gpu_reads import Read, reads
from pallas_kernels.gated_linear_attention.gpu_states import states
from pallas_kernels.gated_linear_attention.tpu_decays import RESET, running_sums

CHUNK = 128  # of 64 and 128 tokens, the one with half the states to write and read


class Kept(NamedTuple):
    """What the backward pass needs. sums: [B,HV,2,T] float32. states: before each chunk, [B,N,HV,K,V] bfloat16."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sums: jax.Array
    states: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(scale, q, k, v, log_decay, initial_state):
    """q, k [B,T,H,K], v [B,T,HV,V] in bfloat16, log_decay [B,T,HV], T whole chunks -> (o [B,T,HV,V], the final state)."""
    return _run_forward(scale, q, k, v, log_decay, initial_state)[0]


def _run_forward(scale, q, k, v, log_decay, initial_state):
    sums = running_sums(jnp.maximum(jnp.moveaxis(log_decay, 1, 2), RESET)[:, :, None], CHUNK)
    final_state, before = states(k, v, initial_state, sums=sums, chunk=CHUNK)
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
    d_initial_state, after = states(kept.q, d_o, d_final_state, sums=kept.sums, chunk=CHUNK, reverse=True, scale=scale)
    operands = {"q": kept.q, "k": kept.k, "v": kept.v, "d_o": d_o, "states": kept.states, "d_states": after}
    d_q, of_q, d_k, of_k, d_v = reads(GRADIENTS, operands, kept.sums, chunk=CHUNK, scale=scale)
    d_log_decay = _d_log_decay(jnp.sum(of_q, axis=2), jnp.sum(of_k, axis=2), kept, after)
    return summed(d_q, kept.q), summed(d_k, kept.k), d_v, d_log_decay, d_initial_state


run.defvjp(_run_forward, _run_backward)


def _d_log_decay(of_q, of_k, kept, after):
    """[B,T,HV] of the products [B,HV,2,T] of q and k with their gradients through the state and through the chunk.

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
    return jnp.moveaxis((sums + through[..., None]).reshape(B, HV, T), 1, 2)
