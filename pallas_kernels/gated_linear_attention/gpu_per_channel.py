"""Gated linear attention on Hopper with a decay a channel. See :mod:`.gpu`; the kernels are of :mod:`.gpu_walk` and :mod:`.gpu_pairs`."""

from functools import partial
from typing import NamedTuple

import jax

from pallas_kernels.gated_linear_attention.gpu_decays import CHUNK as CHUNK
from pallas_kernels.gated_linear_attention.gpu_layout import summed
from pallas_kernels.gated_linear_attention.gpu_pairs import decayed, gradients
from pallas_kernels.gated_linear_attention.gpu_step import Operands
from pallas_kernels.gated_linear_attention.gpu_walk import walk


class Kept(NamedTuple):
    """What the backward pass needs. q_read, k_written, scores, totals: of :func:`.gpu_pairs.decayed`; states: before each chunk,
    [B,N,HV,K,V] bfloat16."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    q_read: jax.Array
    k_written: jax.Array
    scores: jax.Array
    totals: jax.Array
    states: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(scale, q, k, v, log_decay, initial_state):
    """q, k [B,T,H,K], v [B,T,HV,V] in bfloat16, log_decay [B,T,HV,K], T whole chunks -> (o [B,T,HV,V], the final state)."""
    q_read, k_written, scores, totals = decayed(q, k, log_decay, scale=scale)
    return walk(Operands(q_read, k_written, v, pairs=scores, totals=totals), initial_state)


def _forward(scale, q, k, v, log_decay, initial_state):
    q_read, k_written, scores, totals = decayed(q, k, log_decay, scale=scale)
    o, final_state, states = walk(Operands(q_read, k_written, v, pairs=scores, totals=totals), initial_state, every=1)
    return (o, final_state), Kept(q, k, v, log_decay, q_read, k_written, scores, totals, states)


def _backward(scale, kept, cotangents):
    d_o, d_final_state = cotangents
    operands = Operands(kept.k_written, kept.q_read, d_o, pairs=kept.scores, totals=kept.totals)
    d_v, d_initial_state, d_states = walk(operands, d_final_state, reverse=True, every=1)
    of_forward = kept.q, kept.k, kept.v, kept.log_decay, kept.totals, kept.states
    d_q, d_k, d_log_decay = gradients(*of_forward, d_o, d_states, scale=scale)
    return summed(d_q, kept.q), summed(d_k, kept.k), d_v, d_log_decay, d_initial_state


run.defvjp(_forward, _backward)
