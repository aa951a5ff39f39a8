"""Gated linear attention on Hopper with a decay a channel. See :mod:`.gpu`; the kernels are of :mod:`.gpu_states` and :mod:`.gpu_pairs`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.gpu_decays import CHUNK, prepared
from pallas_kernels.gated_linear_attention.gpu_layout import summed
from pallas_kernels.gated_linear_attention.gpu_pairs import decayed, gradients, outputs
from pallas_kernels.gated_linear_attention.gpu_states import states


class Kept(NamedTuple):
    """What the backward pass needs. scores: as :func:`.gpu_pairs.decayed` has them; states: before each chunk, [B,N,HV,K,V] bfloat16."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    scores: jax.Array
    states: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(scale, q, k, v, log_decay, initial_state):
    """q, k [B,T,H,K], v [B,T,HV,V] in bfloat16, log_decay [B,T,HV,K], T whole chunks -> (o [B,T,HV,V], the final state)."""
    return _forward(scale, q, k, v, log_decay, initial_state)[0]


def _forward(scale, q, k, v, log_decay, initial_state):
    parts, total = prepared(log_decay)
    q_read, k_written, scores = decayed(q, k, parts, pairs=True)
    final_state, before = states(k_written, v, initial_state, totals=total, chunk=CHUNK)
    o = outputs(q_read, scores, v, before, reverse=False, scale=scale)
    return (o, final_state), Kept(q, k, v, log_decay, scores, before)


def _backward(scale, kept, cotangents):
    d_o, d_final_state = cotangents
    parts, total = prepared(kept.log_decay)
    q_read, k_written = decayed(kept.q, kept.k, parts, pairs=False)
    d_initial_state, after = states(q_read, d_o, d_final_state, totals=total, chunk=CHUNK, reverse=True, scale=scale)
    d_v = outputs(k_written, kept.scores, d_o, after, reverse=True, scale=scale)
    d_q, d_k, d_log_decay = gradients(kept.q, kept.k, kept.v, parts, kept.states, d_o, after, scale=scale)
    through = total * jnp.einsum("bnhkv,bnhkv->bnhk", kept.states, after, preferred_element_type=jnp.float32)
    d_log_decay += jnp.repeat(through, CHUNK, axis=1)
    return summed(d_q, kept.q), summed(d_k, kept.k), d_v, d_log_decay, d_initial_state


run.defvjp(_forward, _backward)
