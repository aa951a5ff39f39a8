"""The gated delta rule on Hopper with a decay a channel: what the walks take, by Mosaic GPU, all chunks at once. See :mod:`.gpu`.

The running sums c_i of the log decays are [K] here, and E_ij = exp(c_i - c_j). The walks take arrays that have all factors in them:

    k~_i = exp(c_i) k_i        q~_i = scale exp(c_i) q_i        k^_i = beta_i exp(c_C - c_i) k_i        P_ij = scale beta_j q_i . E_ij k_j

and X = (I + A)^-1 with A_ij = beta_j k_i . E_ij k_j for j < i. Pairs meet in the middles of blocks, and sums of log decays are products, as
:mod:`pallas_kernels.gated_linear_attention.gpu_decays` has it: queries and keys meet keys there, through the same decays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_delta_rule import gpu_pairs, gpu_per_channel_gradients
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, product, tile
from pallas_kernels.gated_delta_rule.gpu_gradients import PART
from pallas_kernels.gated_delta_rule.gpu_walk import Keys
from pallas_kernels.gated_linear_attention.gpu_decays import LEVELS, decay_over, meet, positions, since_middle, split, to_middle
from pallas_kernels.gated_linear_attention.gpu_layout import TILED_FLOAT32, kernel, over_columns, over_rows


class Kept(NamedTuple):
    """For the walks and the backward pass. beta: [B,HV,N,C]; log_decay [B,T,HV,K]; decayed: what the walks take; scores: P."""

    beta: jax.Array
    log_decay: jax.Array
    decayed: Keys
    scores: jax.Array

    def keys(self, q, k):
        """What the walks take."""
        return self.decayed

    def gradients(self, plan, q, k, *walked):
        """D q, D k [B,T,HV,K], D beta, D log_decay, by what the walks found: see :mod:`.gpu_per_channel_gradients`."""
        operands = q, k, self.beta, self.log_decay, self.decayed.total
        d_q, d_k, d_beta, d_log_decay = gpu_per_channel_gradients.gradients(plan, *operands, *walked)
        return d_q, d_k, jnp.sum(d_beta, axis=3), d_log_decay


def forward(plan, q, k, beta, log_decay):
    """q, k [B,T,H,K], beta [B,HV,N,C], log_decay [B,T,HV,K] -> X and what else is kept."""
    reads_k, reads_q, written, total, scores, inverse = decayed(plan, q, k, beta, log_decay)
    return inverse, Kept(beta, log_decay, Keys(reads_k, reads_q, written=written, total=total), scores)


def decayed(plan, q, k, beta, log_decay):
    """k~, q~ and k^ [B,T,HV,K] in bfloat16, of log_decay [B,T,HV,K] in float32; the decays of whole chunks [B,HV,N,K] in float32; P and X
    [B,HV,N,C,C] in bfloat16."""
    (B, T, HV, K), N, groups = log_decay.shape, beta.shape[2], beta.shape[1] // q.shape[2]
    slices = K // PART

    def body(q_ref, k_ref, log_decay_ref, beta_ref, *refs):
        reads_k_ref, reads_q_ref, writes_ref, total_ref, scores_ref, inverse_ref, *refs = refs
        q_smem, k_smem, log_decay_smem, beta_smem, total_smem, squares, loaded, beta_loaded = refs
        b, n, h = (platforms.gpu_index(name) for name in ("b", "n", "h"))
        tokens = pl.ds(n * CHUNK, CHUNK)

        def columns(part):
            return pl.ds(part * PART, PART)

        plgpu.copy_gmem_to_smem(beta_ref.at[b, h, n], beta_smem, beta_loaded)
        for part in range(slices):
            for ref, smem, head in ((q_ref, q_smem, h // groups), (k_ref, k_smem, h // groups), (log_decay_ref, log_decay_smem, h)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, head, columns(part)], smem.at[part], loaded.at[part])
        i, j = positions()
        plgpu.barrier_wait(beta_loaded)

        def channels(part, carry):
            q, k, log_decay = q_smem.at[part], k_smem.at[part], squares[:2]
            plgpu.barrier_wait(loaded.at[part])
            total_smem[...] = split(log_decay_smem.at[part], *log_decay)
            plgpu.commit_smem()
            carry = _pairs(q, k, log_decay, squares[2], carry)
            key = _float32(k)
            k[...] = (key * decay_over(j > i, log_decay) * over_rows(beta_smem[...], PART)).astype(jnp.bfloat16)
            since_start = decay_over(j <= i, log_decay)
            q[...] = (_float32(q) * (plan.scale * since_start)).astype(jnp.bfloat16)
            reads_k = squares[0]  # of which nothing is left to read
            reads_k[...] = (key * since_start).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for ref, smem in ((reads_k_ref, reads_k), (reads_q_ref, q), (writes_ref, k)):
                plgpu.copy_smem_to_gmem(smem, ref.at[b, tokens, h, columns(part)])
            plgpu.copy_smem_to_gmem(total_smem, total_ref.at[b, h, n, columns(part)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return carry

        zeros = jnp.zeros((CHUNK, CHUNK)), jnp.zeros((CHUNK, CHUNK)), jnp.zeros((CHUNK,))
        scores, lower, itself = lax.fori_loop(0, slices, channels, zeros)
        scores_smem, inverse_smem, *scratch = squares
        scores = jnp.where(i == j, over_rows(itself, CHUNK), jnp.where(i > j, scores, 0))
        scores_smem[...] = (scores * over_columns(plan.scale * beta_smem[...], CHUNK)).astype(jnp.bfloat16)
        lower = jnp.where(i > j, lower, 0) * over_columns(beta_smem[...], CHUNK)
        inverse_smem[...] = gpu_pairs.inverse(-lower, inverse_smem, scratch).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores_smem, scores_ref.at[b, h, n])
        plgpu.copy_smem_to_gmem(inverse_smem, inverse_ref.at[b, h, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys, square = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((B, T, HV, K), (B, HV, N, CHUNK, CHUNK)))
    total = jax.ShapeDtypeStruct((B, HV, N, K), jnp.float32)
    return kernel(
        body,
        out_type=(keys, keys, keys, total, square, square),
        scratch_types=[
            *[tile(slices, CHUNK, PART)] * 2,
            plgpu.SMEM((slices, CHUNK, PART), jnp.float32, transforms=TILED_FLOAT32),
            plgpu.SMEM((CHUNK,), jnp.float32),
            plgpu.SMEM((PART,), jnp.float32),
            [tile(CHUNK, CHUNK)] * 4,
            plgpu.Barrier(num_arrivals=3, num_barriers=slices),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
        name="gated_delta_rule_decayed",
    )(q, k, log_decay, beta)


def _pairs(q, k, log_decay, met, sums):
    """Adds to the scores of queries and of keys [C,C], below the diagonal, and of queries with their own token's key [C], the part of PART
    channels."""
    i, j = positions()

    def level(power, sums):
        scores, lower = sums
        s = jnp.left_shift(1, power)
        decay = to_middle(log_decay, s)
        met[...] = (_float32(k) * decay).astype(jnp.bfloat16)
        queries = (_float32(q) * decay).astype(jnp.bfloat16)
        plgpu.commit_smem()
        across = jnp.where(meet(i, j, s), 1.0, 0.0)  # a factor: to multiply and add is one instruction, to select and add are two
        scores += across * product((queries, met.T))
        return scores, lower + across * product((met, met.T))

    x, near = since_middle(log_decay)

    def at_once(sums):
        scores, lower = sums
        met[...] = (_float32(k) * jnp.exp2(-x)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        since = jnp.exp2(x)
        # Above the diagonal whatever it comes to: not selected.
        scores = product(((_float32(q) * since).astype(jnp.bfloat16), met.T), start=scores)
        return scores, product(((_float32(k) * since).astype(jnp.bfloat16), met.T), start=lower)

    *sums, itself = sums
    sums = lax.cond(near, at_once, lambda sums: lax.fori_loop(0, LEVELS, level, sums), tuple(sums))
    return *sums, itself + jnp.sum(_float32(q) * _float32(k), axis=1)


def _float32(ref) -> jax.Array:
    return ref[...].astype(jnp.float32)
