"""The gated delta rule on Hopper with a decay a channel: what the walks take, by Mosaic GPU, all chunks at once. See :mod:`.gpu`.

The running sums c_i of the log decays are [K] here, and E_ij = exp(c_i - c_j). The walks take arrays that have all factors in them:

    k~_i = exp(c_i) k_i        q~_i = scale exp(c_i) q_i        k^_i = beta_i exp(c_C - c_i) k_i        P_ij = scale beta_j q_i . E_ij k_j

and X = (I + A)^-1 with A_ij = beta_j k_i . E_ij k_j for j < i. Pairs meet in the middles of blocks, and sums of log decays are products, as
:mod:`pallas_kernels.gated_linear_attention.gpu_decays` has it: queries and keys meet keys there, through the same decays. Forward keeps P
and X for the backward pass; what is of each token alone is computed again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta_rule import gpu_pairs, gpu_per_channel_gradients
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, product, tile
from pallas_kernels.gated_delta_rule.gpu_gradients import PART
from pallas_kernels.gated_delta_rule.gpu_walk import Keys
from pallas_kernels.gated_linear_attention.gpu_decays import LEVELS, decay_over, meet, positions, prepared, to_middle
from pallas_kernels.gated_linear_attention.gpu_layout import kernel, over_columns, over_rows


class Kept(NamedTuple):
    """For the backward pass. beta: [B,HV,N,C]; log_decay, in two parts, and total: of ``gpu_decays.prepared``; scores: P."""

    beta: jax.Array
    log_decay: tuple[jax.Array, jax.Array]
    total: jax.Array
    scores: jax.Array

    def again(self, plan, q, k):
        """The keys for the walks, and P."""
        k, q, written = decayed(plan, q, k, self.beta, self.log_decay, pairs=False)
        return Keys(k, q, written=written, total=self.total), (self.scores,)

    def gradients(self, plan, q, k, pairs, *walked):
        """D q, D k [B,T,HV,K], D beta, D log_decay, by what the walks found: see :mod:`.gpu_per_channel_gradients`."""
        d_q, d_k, d_beta, d_log_decay = gpu_per_channel_gradients.gradients(plan, q, k, *self[:3], *walked)
        return d_q, d_k, jnp.sum(d_beta, axis=3), d_log_decay


def forward(plan, q, k, beta, log_decay):
    """q, k [B,T,H,K], beta [B,HV,N,C], log_decay [B,T,HV,K] -> the keys for the walks, P, X and what is kept."""
    log_decay, total = prepared(log_decay)
    total = jnp.swapaxes(total, 1, 2)
    k, q, written, scores, inverse = decayed(plan, q, k, beta, log_decay, pairs=True)
    return Keys(k, q, written=written, total=total), scores, inverse, Kept(beta, log_decay, total, scores)


def decayed(plan, q, k, beta, log_decay, *, pairs: bool):
    """k~, q~ and k^ [B,T,HV,K], and where ``pairs`` are asked for P and X [B,HV,N,C,C]. All bfloat16; log_decay: two parts [B,T,HV,K]."""
    (B, T, HV, K), N, groups = log_decay[0].shape, beta.shape[2], beta.shape[1] // q.shape[2]
    slices = K // PART

    def body(q_ref, k_ref, coarse_ref, fine_ref, beta_ref, reads_k_ref, reads_q_ref, writes_ref, *rest):
        *pairs_refs, q_smem, k_smem, coarse_smem, fine_smem, beta_smem, squares, loaded, beta_loaded = rest
        b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
        tokens = pl.ds(n * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(beta_ref.at[b, h, n], beta_smem, beta_loaded)
        for part in range(slices):
            columns = pl.ds(part * PART, PART)
            for ref, smem, head in (
                (q_ref, q_smem, h // groups), (k_ref, k_smem, h // groups), (coarse_ref, coarse_smem, h), (fine_ref, fine_smem, h),
            ):  # fmt: skip
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, head, columns], smem.at[part], loaded.at[part])
        i, j = positions()
        plgpu.barrier_wait(beta_loaded)

        def channels(part, carry):
            plgpu.barrier_wait(loaded.at[part])
            log_decay = coarse_smem.at[part], fine_smem.at[part]
            q, k = q_smem.at[part], k_smem.at[part]
            if pairs:
                carry = _pairs(q, k, log_decay, squares[0], carry)
            key = _float32(k)
            k[...] = (key * decay_over(j > i, log_decay) * over_rows(beta_smem[...], PART)).astype(jnp.bfloat16)
            since_start = decay_over(j <= i, log_decay)
            q[...] = (_float32(q) * (plan.scale * since_start)).astype(jnp.bfloat16)
            coarse_smem[part] = (key * since_start).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for ref, smem in ((reads_k_ref, coarse_smem), (reads_q_ref, q_smem), (writes_ref, k_smem)):
                plgpu.copy_smem_to_gmem(smem.at[part], ref.at[b, tokens, h, pl.ds(part * PART, PART)])
            return carry

        zeros = jnp.zeros((CHUNK, CHUNK)), jnp.zeros((CHUNK, CHUNK)), jnp.zeros((CHUNK,))
        carry = lax.fori_loop(0, slices, channels, zeros if pairs else ())
        if pairs:
            scores_ref, inverse_ref = pairs_refs
            scores, lower, itself = carry
            scores_smem, inverse_smem, *scratch = squares
            scores = jnp.where(i == j, over_rows(itself, CHUNK), jnp.where(i > j, scores, 0))
            scores_smem[...] = (scores * over_columns(plan.scale * beta_smem[...], CHUNK)).astype(jnp.bfloat16)
            lower = jnp.where(i > j, lower, 0) * over_columns(beta_smem[...], CHUNK)
            inverse_smem[...] = gpu_pairs.inverse(-lower, inverse_smem, scratch).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scores_smem, scores_ref.at[b, h, n])
            plgpu.copy_smem_to_gmem(inverse_smem, inverse_ref.at[b, h, n])
        plgpu.wait_smem_to_gmem(0)

    keys, square = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((B, T, HV, K), (B, HV, N, CHUNK, CHUNK)))
    return kernel(
        body,
        out_type=(*[keys] * 3, *[square] * (2 if pairs else 0)),
        scratch_types=[
            *[tile(slices, CHUNK, PART)] * 4,
            plgpu.SMEM((CHUNK,), jnp.float32),
            [tile(CHUNK, CHUNK)] * (4 if pairs else 0),
            plgpu.Barrier(num_arrivals=4, num_barriers=slices),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
        name="gated_delta_rule_decayed",
    )(q, k, *log_decay, beta)


def _pairs(q, k, log_decay, met, sums):
    """Adds to the scores of queries and of keys [C,C], and of queries with their own token's key [C], the part of PART channels."""
    i, j = positions()

    def level(power, sums):
        scores, lower = sums
        s = jnp.left_shift(1, power)
        decay = to_middle(log_decay, s)
        met[...] = (_float32(k) * decay).astype(jnp.bfloat16)
        queries = (_float32(q) * decay).astype(jnp.bfloat16)
        plgpu.commit_smem()
        across = meet(i, j, s)
        scores += jnp.where(across, product((queries, met.T)), 0)
        return scores, lower + jnp.where(across, product((met, met.T)), 0)

    *sums, itself = sums
    return *lax.fori_loop(0, LEVELS, level, tuple(sums)), itself + jnp.sum(_float32(q) * _float32(k), axis=1)


def _float32(ref) -> jax.Array:
    return ref[...].astype(jnp.float32)
