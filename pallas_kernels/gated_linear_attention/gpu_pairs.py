"""What the tokens of a chunk of 64 are to each other where decays are one a channel: Mosaic GPU kernels, all chunks at once.

Pairs are split, and decays are summed, as :mod:`.gpu_decays` has it. A warpgroup is a CTA and has the 64 tokens of a chunk as its rows,
the channels in slices of 64.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_linear_attention.gpu_decays import (
    CHUNK,
    LEVELS,
    decay_over,
    meet,
    ones,
    parts,
    positions,
    since_middle,
    split,
    to_middle,
)
from pallas_kernels.gated_linear_attention.gpu_layout import TILE, TILED, TILED_FLOAT32, kernel, over_columns, over_rows, product


def decayed(q, k, log_decay, *, scale: float):
    """q, k [B,T,H,K] bfloat16 and log_decay [B,T,HV,K] float32, T a multiple of 64, of N chunks.

    Returns scale * q decayed since the start of its chunk, k decayed until the end of it, both [B,T,HV,K], the scores [B,T,HV,64], scale *
    q_i . (k_j decayed from j to i), 0 where j > i, j a token of i's chunk, all bfloat16; and the chunks' decays [B,N,HV,K] float32.
    """
    (B, T, HV, K), H = log_decay.shape, q.shape[2]
    slices = K // TILE
    slots = min(slices, 2)

    def body(q_ref, k_ref, log_decay_ref, reads_ref, writes_ref, scores_ref, totals_ref, *scratch):
        q_smem, k_smem, log_decay_smem, coarse_smem, fine_smem, met_smem, total_smem, loaded = scratch
        b, n, h = (platforms.gpu_index(name) for name in ("batch", "chunk", "head"))
        tokens = pl.ds(n * CHUNK, CHUNK)

        def load(part):
            columns, slot = pl.ds(part * TILE, TILE), lax.rem(part, slots)
            for ref, smem, head in ((q_ref, q_smem, h // (HV // H)), (k_ref, k_smem, h // (HV // H)), (log_decay_ref, log_decay_smem, h)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, head, columns], smem.at[slot], loaded.at[slot])

        for part in range(slots):
            load(part)
        i, j = positions()

        def channels(part, carry):
            scores, itself = carry
            columns, slot = pl.ds(part * TILE, TILE), lax.rem(part, slots)
            q_smem_, k_smem_ = q_smem.at[slot], k_smem.at[slot]
            plgpu.barrier_wait(loaded.at[slot])
            total_smem[...] = split(log_decay_smem.at[slot], coarse_smem, fine_smem)
            plgpu.commit_smem()
            log_decay = coarse_smem, fine_smem

            def level(power, scores):
                s = jnp.left_shift(1, power)
                met_smem[...] = _met(q_smem_, k_smem_, to_middle(log_decay, s), s)
                plgpu.commit_smem()
                return scores + jnp.where(meet(i, j, s), product(met_smem, met_smem.transpose((1, 0))), 0)

            x, near = since_middle(log_decay)

            def at_once(scores):
                met_smem[...] = (k_smem_[...].astype(jnp.float32) * jnp.exp2(-x)).astype(jnp.bfloat16)
                queries = (q_smem_[...].astype(jnp.float32) * jnp.exp2(x)).astype(jnp.bfloat16)
                plgpu.commit_smem()
                return product(queries, met_smem.transpose((1, 0)), start=scores)  # above the diagonal whatever it comes to: not selected

            scores = lax.cond(near, at_once, lambda scores: lax.fori_loop(0, LEVELS, level, scores), scores)
            q, k = (smem[...].astype(jnp.float32) for smem in (q_smem_, k_smem_))
            itself += jnp.sum(q * k, axis=1)
            q_smem_[...] = (scale * q * decay_over(j <= i, log_decay)).astype(jnp.bfloat16)
            k_smem_[...] = (k * decay_over(j > i, log_decay)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for ref, smem in ((reads_ref, q_smem_), (writes_ref, k_smem_)):
                plgpu.copy_smem_to_gmem(smem, ref.at[b, tokens, h, columns])
            plgpu.copy_smem_to_gmem(total_smem, totals_ref.at[b, n, h, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(part + slots < slices)
            def _():
                load(part + slots)

            return scores, itself

        scores, itself = lax.fori_loop(0, slices, channels, (jnp.zeros((CHUNK, CHUNK), jnp.float32), jnp.zeros((CHUNK,), jnp.float32)))
        scores = jnp.where(i == j, over_rows(itself, CHUNK), jnp.where(i > j, scores, 0))
        met_smem[...] = (scale * scores).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(met_smem, scores_ref.at[b, tokens, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    width = plgpu.SMEM((slots, CHUNK, TILE), jnp.bfloat16, transforms=TILED)
    widths = jax.ShapeDtypeStruct((B, T, HV, K), jnp.bfloat16)
    return kernel(
        body,
        out_type=(
            widths,
            widths,
            jax.ShapeDtypeStruct((B, T, HV, CHUNK), jnp.bfloat16),
            jax.ShapeDtypeStruct((B, T // CHUNK, HV, K), jnp.float32),
        ),
        scratch_types=[
            width,
            width,
            plgpu.SMEM((slots, CHUNK, TILE), jnp.float32, transforms=TILED_FLOAT32),
            *[_tile()] * 3,
            plgpu.SMEM((TILE,), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        ],
        grid=(B, T // CHUNK, HV),
        grid_names=("batch", "chunk", "head"),
        name="gated_linear_attention_decayed",
    )(q, k, log_decay)


def gradients(q, k, v, log_decay, totals, before, d_o, after, *, scale: float):
    """The gradients of q, k [B,T,HV,K] in bfloat16, and of the log decays in float32.

    q, k, log_decay, totals: of :func:`decayed`; v, d_o [B,T,HV,V]; before: the state before each chunk, after: the gradient of
    that after it, [B,N,HV,K,V] bfloat16.
    """
    (B, T, HV, K), H, steps = log_decay.shape, q.shape[2], v.shape[3] // TILE

    def body(*refs):
        q_ref, k_ref, v_ref, log_decay_ref, totals_ref, before_ref, d_o_ref, after_ref, d_q_ref, d_k_ref, d_decay_ref = refs[:11]
        v_smem, d_o_smem, before_smem, after_smem, q_smem, k_smem, coarse_smem, fine_smem, met_smem, d_smem, total_smem = refs[11:22]
        loaded, rest_loaded = refs[22:]
        b, n, h, block = (platforms.gpu_index(name) for name in ("batch", "chunk", "head", "block"))
        tokens, columns = pl.ds(n * CHUNK, CHUNK), pl.ds(block * TILE, TILE)
        here, shared = (b, tokens, h, columns), (b, tokens, h // (HV // H), columns)

        def load(step):
            values = pl.ds(step * TILE, TILE)
            for ref, smem in ((v_ref, v_smem), (d_o_ref, d_o_smem)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, h, values], smem, loaded)
            for ref, smem in ((before_ref, before_smem), (after_ref, after_smem)):
                plgpu.copy_gmem_to_smem(ref.at[b, n, h, columns, values], smem, loaded)

        load(0)
        for ref, smem, where in (
            (q_ref, q_smem, shared), (k_ref, k_smem, shared), (log_decay_ref, d_smem, here), (totals_ref, total_smem, (b, n, h, columns)),
        ):  # fmt: skip
            plgpu.copy_gmem_to_smem(ref.at[where], smem, rest_loaded)

        def contract(d_scores, d_reads, d_writes):
            through = jnp.zeros((TILE,), jnp.float32)
            for step in range(steps):
                plgpu.barrier_wait(loaded)
                plgpu.wgmma(d_scores, d_o_smem, v_smem.transpose((1, 0)))
                plgpu.wgmma(d_reads, d_o_smem, before_smem.transpose((1, 0)))
                plgpu.wgmma(d_writes, v_smem, after_smem.transpose((1, 0)))
                through += jnp.sum(before_smem[...].astype(jnp.float32) * after_smem[...].astype(jnp.float32), axis=1)
                if step + 1 < steps:
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()
                    load(step + 1)
            return d_scores[...], d_reads[...], d_writes[...], through

        accumulator = plgpu.ACC((CHUNK, TILE), jnp.float32)
        d_scores, d_reads, d_writes, through = pl.run_scoped(contract, *[accumulator] * 3)
        i, j = positions()
        d_itself = scale * jnp.sum(jnp.where(i == j, d_scores, 0), axis=1)
        d_scores_smem = v_smem  # which nothing else is read from any more
        d_scores_smem[...] = jnp.where(i > j, scale * d_scores, 0).astype(jnp.bfloat16)

        plgpu.barrier_wait(rest_loaded)
        total_smem[...] *= through
        split(d_smem, coarse_smem, fine_smem)
        plgpu.commit_smem()
        log_decay = coarse_smem, fine_smem
        d_q = scale * decay_over(j <= i, log_decay) * d_reads
        d_k = decay_over(j > i, log_decay) * d_writes
        # Of the log decay of token t: every pair j < t <= i, the reads of the state from t on, and the writes to it before t. Pairs on one
        # side of t are in both sums of their difference, by the same rounded numbers; a token with itself is in neither.
        from_t = d_smem
        from_t[...] = q_smem[...].astype(jnp.float32) * d_q
        for smem, part in zip((before_smem, after_smem), parts(k_smem[...].astype(jnp.float32) * d_k), strict=True):
            smem[...] = part

        def by_levels(d):
            identity = met_smem
            identity[...] = ones(i == j)
            plgpu.commit_smem()
            both = product(d_scores_smem.transpose((1, 0)), identity, start=d_scores_smem[...].astype(jnp.float32))
            d_scores_smem[...] = both.astype(jnp.bfloat16)  # for both tokens of a pair
            return lax.fori_loop(0, LEVELS, level, d)

        def level(power, d):
            d_q, d_k = d
            s = jnp.left_shift(1, power)
            is_second = jnp.where((i & s) != 0, 1.0, 0.0)
            decay = to_middle(log_decay, s)
            met_smem[...] = _met(q_smem, k_smem, decay, s)
            plgpu.commit_smem()
            d_met = product(jnp.where(meet(i, j, s), d_scores_smem[...], 0), met_smem)
            from_t[...] += (2 * is_second - 1) * (met_smem[...].astype(jnp.float32) * d_met)
            d_met *= decay
            return d_q + is_second * d_met, d_k + (1 - is_second) * d_met

        x, near = since_middle(log_decay)

        def at_once(d):
            d_q, d_k = d
            since, until = jnp.exp2(x), jnp.exp2(-x)
            reader_smem, read_smem = met_smem, d_o_smem
            reader_smem[...] = (q_smem[...].astype(jnp.float32) * since).astype(jnp.bfloat16)
            read_smem[...] = (k_smem[...].astype(jnp.float32) * until).astype(jnp.bfloat16)
            plgpu.commit_smem()
            # One after the other: the registers do not hold both.
            d_reader = product(d_scores_smem, read_smem)
            from_t[...] += reader_smem[...].astype(jnp.float32) * d_reader
            d_q += since * d_reader
            d_read = product(d_scores_smem.transpose((1, 0)), reader_smem)
            from_t[...] -= read_smem[...].astype(jnp.float32) * d_read
            return d_q, d_k + until * d_read

        d_q, d_k = lax.cond(near, at_once, by_levels, (d_q, d_k))
        for smem, part in zip((v_smem, d_o_smem), parts(from_t[...]), strict=True):
            smem[...] = part
        q, k = q_smem[...].astype(jnp.float32), k_smem[...].astype(jnp.float32)
        q_smem[...] = (d_q + over_rows(d_itself, TILE) * k).astype(jnp.bfloat16)
        k_smem[...] = (d_k + over_rows(d_itself, TILE) * q).astype(jnp.bfloat16)
        plgpu.commit_smem()
        later, earlier = ones(j >= i), ones(j < i)
        d_decay = product(later, v_smem, later, d_o_smem, earlier, before_smem, earlier, after_smem)
        d_smem[...] = d_decay + over_columns(total_smem[...], CHUNK)
        plgpu.commit_smem()
        for smem, ref in ((q_smem, d_q_ref), (k_smem, d_k_ref), (d_smem, d_decay_ref)):
            plgpu.copy_smem_to_gmem(smem, ref.at[here])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((B, T, HV, K), dtype) for dtype in (jnp.bfloat16, jnp.bfloat16, jnp.float32)),
        scratch_types=[
            *[_tile()] * 9,
            plgpu.SMEM((CHUNK, TILE), jnp.float32, transforms=TILED_FLOAT32),
            plgpu.SMEM((TILE,), jnp.float32),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=4),
        ],
        grid=(B, T // CHUNK, HV, K // TILE),
        grid_names=("batch", "chunk", "head", "block"),
        name="gated_linear_attention_gradients",
    )(q, k, v, log_decay, totals, before, d_o, after)


def _tile():
    return plgpu.SMEM((CHUNK, TILE), jnp.bfloat16, transforms=TILED)


def _met(q_smem, k_smem, decay, s):
    """[C,64], the keys of first halves and the queries of second halves, at the middle."""
    second = (positions()[0] & s) != 0
    return (jnp.where(second, q_smem[...], k_smem[...]).astype(jnp.float32) * decay).astype(jnp.bfloat16)
