"""The gated delta rule on Hopper with a decay a head or none: what the walks take, and what they say of the gates. See :mod:`.gpu`.

Sums of log decays have two parts, as in :mod:`pallas_kernels.gated_linear_attention.tpu_decays`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import gpu_gradients, gpu_pairs
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, Gate
from pallas_kernels.gated_delta_rule.gpu_gradients import Sum
from pallas_kernels.gated_delta_rule.gpu_walk import Keys
from pallas_kernels.gated_linear_attention.tpu_decays import RESET


class Kept(NamedTuple):
    """For the walks and the backward pass. gates: [B,HV,N,GATES,C]; scores, lower: P and L."""

    gates: jax.Array
    scores: jax.Array
    lower: jax.Array

    def keys(self, q, k):
        """What the walks take."""
        return Keys(k, q, self.gates)

    def gradients(self, plan, q, k, *walked):
        """D q, D k [B,T,HV,K], D beta, D log_decay, by what the walks found: see :func:`.gpu_gradients.gradients`."""
        d_q, d_k, sums = gpu_gradients.gradients(plan, q, k, *self, *walked)
        return d_q, d_k, *_d_gates(self.gates, sums)


def forward(plan, q, k, beta, log_decay):
    """q, k [B,T,H,K], beta, log_decay [B,HV,N,C] -> X and what else is kept."""
    gates = _gates(beta, jnp.maximum(log_decay, RESET))
    scores, lower, inverse = gpu_pairs.pairs(plan, q, k, gates)
    return inverse, Kept(gates, scores, lower)


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
