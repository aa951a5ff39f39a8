"""The gradients of q, k and decays a head by those of the states, by Mosaic GPU: all chunks, and PART channels of the keys, at once.

With P, L, X and e as in :mod:`.gpu_pairs` and :mod:`.gpu_forward`, F = E diag(beta) and D the gradients,

    D q = (scale (D o e^T) F) k + scale exp(c) D o S^T
    D k = (scale (D o e^T) F)^T q - ((D v e^T) F)^T k - ((D v e^T) F) k + exp(c_C - c) beta e (D S')^T - exp(c) D v S^T

where e^T and the pairs' factors meet element by element, on and below the diagonal for queries and below it for keys.
"""

from enum import IntEnum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, Gate, between, call, column_of, product, row_of, squares, tile

PART = 64  # channels of the keys, and columns of the values at a time


class Sum(IntEnum):
    """Rows of what the gates' gradients are made of, [SUMS,C] float32 a chunk and part; a pair i, j is worth D P_ij P_ij + D L_ij L_ij."""

    EARLIER = 0  # of token i, over j < i, times beta_j; of the first part alone
    LATER = 1  # of token j, over i > j; of the first part alone
    ITSELF = 2  # of the pair of a query and its own key; of the first part alone
    READS = 3  # of the state by token i
    WRITES = 4  # to the state by token j, for beta_j = 1
    STATE = 5  # sums of S * D S', whatever the token


class Values(NamedTuple):
    """What the walks found of a chunk, PART channels of the keys and as many columns of the values at a time."""

    b: jax.Array
    h: jax.Array
    n: jax.Array
    channels: pl.Slice
    refs: list[jax.Ref]  # S before the chunk, e, D o, D v, and D S' after it, as the walks have them
    buffers: list[jax.Ref]  # of each [PART,PART]
    loaded: jax.Ref

    @property
    def tokens(self) -> pl.Slice:
        return pl.ds(self.n * CHUNK, CHUNK)

    def load(self, block: int):
        columns = pl.ds(block * PART, PART)
        of_states, of_tokens = (self.b, self.h, self.n, columns, self.channels), (self.b, self.tokens, self.h, columns)
        where = of_states, (self.b, self.h, self.n, columns), of_tokens, of_tokens, of_states
        for ref, at, buffer in zip(self.refs, where, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[at], buffer, self.loaded)

    def met(self) -> list[jax.Array]:
        """D o S^T, D v S^T, e (D S')^T, D o e^T, D v e^T, and S (D S')^T, [64,64] each. The first block of columns is under way."""
        blocks = self.refs[0].shape[3] // PART

        def run(reads_q, reads_k, writes, pairs_q, pairs_k, by_states):
            for block in range(blocks):
                plgpu.barrier_wait(self.loaded)
                states, errors, d_o, d_v, d_states = self.buffers
                plgpu.wgmma(reads_q, d_o, states)
                plgpu.wgmma(reads_k, d_v, states)
                plgpu.wgmma(writes, errors.T, d_states)
                plgpu.wgmma(pairs_q, d_o, errors)
                plgpu.wgmma(pairs_k, d_v, errors)
                plgpu.wgmma(by_states, states.T, d_states)
                if block + 1 < blocks:
                    plgpu.wgmma_wait(0)
                    self.load(block + 1)
            return [total[...] for total in (reads_q, reads_k, writes, pairs_q, pairs_k, by_states)]

        return pl.run_scoped(run, *[plgpu.ACC((CHUNK, CHUNK), jnp.float32)] * 6)


def gradients(plan, q, k, gates, scores, lower, states, errors, d_o, d_v, d_states):
    """Arrays as the other kernels have them -> D q, D k [B,T,HV,K], sums [B,HV,N,K/PART,SUMS,C]."""
    (B, HV, N), (T, K) = gates.shape[:3], (q.shape[1], q.shape[3])
    d_keys = jax.ShapeDtypeStruct((B, T, HV, K), q.dtype)
    square = tile(CHUNK, PART)
    return call(
        partial(_kernel, plan),
        *(q, k, scores, lower, gates, states, errors, d_o, d_v, d_states),
        name="gradients",
        out_type=(d_keys, d_keys, jax.ShapeDtypeStruct((B, HV, N, K // PART, len(Sum), CHUNK), jnp.float32)),
        scratch_types=[
            [square] * 4,
            plgpu.SMEM((len(Gate), CHUNK), jnp.float32),
            [square] * 5,
            plgpu.SMEM((len(Sum), CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=5),
            plgpu.Barrier(num_arrivals=5),
        ],
        grid=(B, HV, N, K // PART),
        grid_names=("b", "h", "n", "part"),
    )


def _kernel(plan, *refs):
    q_ref, k_ref, scores_ref, lower_ref, gates_ref, *values_refs, d_q_ref, d_k_ref, sums_ref = refs[:13]
    (q, k, scores, lower), gates, buffers, sums, loaded, values_loaded = refs[13:]
    b, h, n, part = (platforms.gpu_index(name) for name in ("b", "h", "n", "part"))
    values = Values(b, h, n, pl.ds(part * PART, PART), values_refs, buffers, values_loaded)
    values.load(0)
    for source, buffer in ((q_ref, q), (k_ref, k)):
        plgpu.copy_gmem_to_smem(source.at[b, values.tokens, h // plan.groups, values.channels], buffer, loaded)
    for source, buffer in ((scores_ref, scores), (lower_ref, lower), (gates_ref, gates)):
        plgpu.copy_gmem_to_smem(source.at[b, h, n], buffer, loaded)

    *met, by_states = values.met()
    i, j = squares()
    sums[Sum.STATE] = jnp.sum(jnp.where(i == j, by_states, 0.0), axis=1)
    plgpu.barrier_wait(loaded)
    d_q, d_k = _of_keys(plan, *met, q, k, scores, lower, gates, sums)
    for x, buffer, ref in ((d_q, buffers[0], d_q_ref), (d_k, buffers[1], d_k_ref)):
        buffer[...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, ref.at[b, values.tokens, h, values.channels])
    plgpu.copy_smem_to_gmem(sums, sums_ref.at[b, h, n, part])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _of_keys(plan, reads_q, reads_k, writes, pairs_q, pairs_k, q, k, scores, lower, gates, sums):
    """D q, D k [C,PART] float32, by what the values of the chunk met: D o S^T, D v S^T, e (D S')^T, D o e^T and D v e^T.

    Writes the sums; ``scores`` and ``lower`` are overwritten with operands.
    """
    # One kind of pairs after the other, and into shared memory: the registers do not hold all at once.
    i, j = squares()
    decay = between(gates) * row_of(gates, Gate.BETA)
    pairs_k = jnp.where(i > j, -pairs_k, 0.0)
    by_pairs = pairs_k * _square(lower)
    lower[...] = (pairs_k * decay).astype(jnp.bfloat16)
    by_queries = pairs_q * _square(scores)
    scores[...] = (pairs_q * (plan.scale * decay)).astype(jnp.bfloat16)
    by_pairs += jnp.where(i > j, by_queries, 0.0)
    sums[Sum.EARLIER] = jnp.sum(by_pairs * row_of(gates, Gate.BETA), axis=1)
    sums[Sum.LATER] = jnp.sum(by_pairs, axis=0)
    sums[Sum.ITSELF] = jnp.sum(jnp.where(i == j, by_queries, 0.0), axis=1)

    since_start, until_end = (column_of(gates, x) for x in (Gate.SINCE_START, Gate.UNTIL_END))
    reads_q, reads_k, writes = reads_q * (plan.scale * since_start), reads_k * -since_start, writes * until_end
    q16, k16 = _square(q), _square(k)
    sums[Sum.READS] = jnp.sum(q16 * reads_q + k16 * reads_k, axis=1)
    sums[Sum.WRITES] = jnp.sum(k16 * writes, axis=1)
    of_states = reads_k + writes * column_of(gates, Gate.BETA)

    plgpu.commit_smem()
    return product((scores, k), start=reads_q), product((scores.T, q), (lower.T, k), (lower, k), start=of_states)


def _square(ref) -> jax.Array:
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32)
