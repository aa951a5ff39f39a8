"""Gated linear attention on Hopper with a decay a head. See :mod:`.gpu`; the kernels are of :mod:`.gpu_walk` and :mod:`.gpu_gradients`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention import gpu_walk
from pallas_kernels.gated_linear_attention.gpu_gradients import CHUNK, gradients
from pallas_kernels.gated_linear_attention.gpu_layout import summed
from pallas_kernels.gated_linear_attention.gpu_step import Operands
from pallas_kernels.gated_linear_attention.gpu_walk import walk
from pallas_kernels.gated_linear_attention.tpu_decays import RESET, running_sums

EVERY = CHUNK // gpu_walk.CHUNK  # chunks of a walk to one of the gradients: half the states to write and read


class Kept(NamedTuple):
    """What the backward pass needs. states: before each chunk, [B,N,HV,K,V] bfloat16."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    states: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(scale, q, k, v, log_decay, initial_state):
    """q, k [B,T,H,K], v [B,T,HV,V] in bfloat16, log_decay [B,T,HV], T whole chunks -> (o [B,T,HV,V], the final state)."""
    return walk(Operands(q, k, v, _sums(log_decay, gpu_walk.CHUNK)), initial_state, scale=scale)


def _forward(scale, q, k, v, log_decay, initial_state):
    operands = Operands(q, k, v, _sums(log_decay, gpu_walk.CHUNK))
    o, final_state, states = walk(operands, initial_state, scale=scale, every=EVERY)
    return (o, final_state), Kept(q, k, v, log_decay, states)


def _backward(scale, kept, cotangents):
    d_o, d_final_state = cotangents
    operands = Operands(kept.k, kept.q, d_o, _sums(kept.log_decay, gpu_walk.CHUNK))
    d_v, d_initial_state, d_states = walk(operands, d_final_state, scale=scale, reverse=True, every=EVERY)
    sums = _sums(kept.log_decay, CHUNK)
    d_q, d_k, products = gradients(kept.q, kept.k, kept.v, sums, kept.states, d_o, d_states, scale=scale)
    return summed(d_q, kept.q), summed(d_k, kept.k), d_v, _d_log_decay(jnp.sum(products, axis=3), sums), d_initial_state


run.defvjp(_forward, _backward)


def _sums(log_decay, chunk):
    """[B,T,HV] -> [B,N,HV,2,C], the sums since a chunk's start in two parts."""
    B, T, HV = log_decay.shape
    sums = running_sums(jnp.maximum(jnp.moveaxis(log_decay, 1, 2), RESET)[:, :, None], chunk)
    return jnp.moveaxis(sums.reshape(B, HV, 2, T // chunk, chunk), 3, 1)


def _d_log_decay(products, sums):
    """[B,T,HV] of the products [B,N,HV,3,C] of :func:`.gpu_gradients.gradients`.

    Of the log decay of token t: the reads of the state from t on, every pair j < t <= i, the writes to the state before t, and the
    state itself. Pairs on one side of t are in both sums of their difference; a token with itself is in neither.
    """
    B, N, HV, _, C = products.shape
    before = jnp.tri(C, k=-1)  # [t, j]: j < t
    found = jnp.einsum("ij,bnhi->bnhj", 1 - before.T, products[..., 0, :], precision=jax.lax.Precision.HIGHEST)
    found += jnp.einsum("tj,bnhj->bnht", before, products[..., 1, :], precision=jax.lax.Precision.HIGHEST)
    total = jnp.exp(jnp.sum(sums[..., -1], axis=3))
    found += (total * jnp.sum(products[..., 2, :], axis=3))[..., None]
    return jnp.moveaxis(found, 2, 3).reshape(B, N * C, HV)
