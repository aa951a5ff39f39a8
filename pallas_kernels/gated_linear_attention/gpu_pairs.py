"""What the tokens of a chunk of 64 are to each other where decays are one a channel: Mosaic GPU kernels, all chunks at once.

Pairs are split, and decays are summed, as :mod:`.gpu_decays` has it. A warpgroup is a CTA and has the 64 tokens of a chunk as its rows,
the channels in slices of 64.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.gpu_decays import CHUNK, LEVELS, decay_over, meet, ones, parts, positions, to_middle
from pallas_kernels.gated_linear_attention.gpu_layout import TILE, TILED, TILED_FLOAT32, kernel, over_rows, product


def decayed(q, k, log_decay, *, pairs: bool):
    """q, k [B,T,H,K] bfloat16 and the two parts of the log decays, each [B,T,HV,K] bfloat16; T a multiple of 64.

    Returns q decayed since the start of its chunk, k decayed until the end of it, both [B,T,HV,K], and where ``pairs`` are asked for
    the scores [B,T,HV,64]: q_i . (k_j decayed from j to i), 0 where j > i, j a token of i's chunk. All bfloat16.
    """
    (B, T, HV, K), H = log_decay[0].shape, q.shape[2]
    slices = K // TILE

    def body(q_ref, k_ref, coarse_ref, fine_ref, reads_ref, writes_ref, *rest):
        *scores_ref, q_smem, k_smem, coarse_smem, fine_smem, met_smem, loaded = rest
        b, n, h = (lax.axis_index(name) for name in ("batch", "chunk", "head"))
        tokens = pl.ds(n * CHUNK, CHUNK)
        for part in range(slices):
            columns = pl.ds(part * TILE, TILE)
            for ref, smem, head in (
                (q_ref, q_smem, h // (HV // H)), (k_ref, k_smem, h // (HV // H)), (coarse_ref, coarse_smem, h), (fine_ref, fine_smem, h),
            ):  # fmt: skip
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, head, columns], smem.at[part], loaded.at[part])

        i, j = positions()

        def channels(part, carry):
            scores, itself = carry
            plgpu.barrier_wait(loaded.at[part])
            log_decay = coarse_smem.at[part], fine_smem.at[part]

            def level(power, scores):
                s = jnp.left_shift(1, power)
                met_smem[...] = _met(q_smem.at[part], k_smem.at[part], to_middle(log_decay, s), s)
                plgpu.commit_smem()
                return scores + jnp.where(meet(i, j, s), product(met_smem, met_smem.transpose((1, 0))), 0)

            q, k = (smem[part].astype(jnp.float32) for smem in (q_smem, k_smem))
            if pairs:
                scores, itself = lax.fori_loop(0, LEVELS, level, scores), itself + jnp.sum(q * k, axis=1)
            q_smem[part] = (q * decay_over(j <= i, log_decay)).astype(jnp.bfloat16)
            k_smem[part] = (k * decay_over(j > i, log_decay)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for ref, smem in ((reads_ref, q_smem), (writes_ref, k_smem)):
                plgpu.copy_smem_to_gmem(smem.at[part], ref.at[b, tokens, h, pl.ds(part * TILE, TILE)])
            return scores, itself

        scores, itself = lax.fori_loop(0, slices, channels, (jnp.zeros((CHUNK, CHUNK)), jnp.zeros((CHUNK,))))
        for ref in scores_ref:
            met_smem[...] = jnp.where(i == j, over_rows(itself, CHUNK), jnp.where(i > j, scores, 0)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(met_smem, ref.at[b, tokens, h])
        plgpu.wait_smem_to_gmem(0)

    width = plgpu.SMEM((slices, CHUNK, TILE), jnp.bfloat16, transforms=TILED)
    return kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((B, T, HV, n), jnp.bfloat16) for n in (K, K, *[CHUNK] * pairs)),
        scratch_types=[*[width] * 4, _tile(), plgpu.Barrier(num_arrivals=4, num_barriers=slices)],
        grid=(B, T // CHUNK, HV),
        grid_names=("batch", "chunk", "head"),
        name="gated_linear_attention_decayed",
    )(q, k, *log_decay)


def outputs(a, pairs, y, state, *, reverse: bool, scale: float):
    """a [B,T,HV,K] reads the state [B,N,HV,K,V] before its chunk, and by ``pairs`` [B,T,HV,64] the y [B,T,HV,V] in it.

    Returns scale * (a state + pairs y), or with ``reverse`` a state + scale * pairs^T y; everything in bfloat16.
    """
    (B, T, HV, K), V = a.shape, y.shape[3]
    steps = K // TILE

    def body(a_ref, pairs_ref, y_ref, state_ref, out_ref, a_smem, state_smem, pairs_smem, y_smem, loaded, rest_loaded):
        b, n, h, block = (lax.axis_index(name) for name in ("batch", "chunk", "head", "block"))
        here, columns = (b, pl.ds(n * CHUNK, CHUNK), h), pl.ds(block * TILE, TILE)
        for step in range(steps):
            rows = pl.ds(step * TILE, TILE)
            plgpu.copy_gmem_to_smem(a_ref.at[*here, rows], a_smem.at[step], loaded.at[step])
            plgpu.copy_gmem_to_smem(state_ref.at[b, n, h, rows, columns], state_smem.at[step], loaded.at[step])
        plgpu.copy_gmem_to_smem(pairs_ref.at[here], pairs_smem, rest_loaded)
        plgpu.copy_gmem_to_smem(y_ref.at[*here, columns], y_smem, rest_loaded)

        def multiply(of_state, of_tokens):
            for step in range(steps):
                plgpu.barrier_wait(loaded.at[step])
                plgpu.wgmma(of_state, a_smem.at[step], state_smem.at[step])
            plgpu.barrier_wait(rest_loaded)
            plgpu.wgmma(of_tokens, pairs_smem.transpose((1, 0)) if reverse else pairs_smem, y_smem)
            return of_state[...], of_tokens[...]

        accumulator = plgpu.ACC((CHUNK, TILE), jnp.float32)
        of_state, of_tokens = pl.run_scoped(multiply, accumulator, accumulator)
        out = of_state + scale * of_tokens if reverse else scale * (of_state + of_tokens)
        y_smem[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, out_ref.at[*here, columns])
        plgpu.wait_smem_to_gmem(0)

    width = plgpu.SMEM((steps, CHUNK, TILE), jnp.bfloat16, transforms=TILED)
    return kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(y.shape, jnp.bfloat16),),
        scratch_types=[
            width, width, _tile(), _tile(), plgpu.Barrier(num_arrivals=2, num_barriers=steps), plgpu.Barrier(num_arrivals=2)
        ],
        grid=(B, T // CHUNK, HV, V // TILE),
        grid_names=("batch", "chunk", "head", "block"),
        name="gated_linear_attention_outputs",
    )(a, pairs, y, state)[0]  # fmt: skip


def gradients(q, k, v, log_decay, before, d_o, after, *, scale: float):
    """The gradients of q, k [B,T,HV,K] in bfloat16, and of the log decays in float32 but for the decay of the state before a chunk.

    q, k, log_decay: of :func:`decayed`; before: the state before each chunk, after: the gradient of that after it, [B,N,HV,K,V] bfloat16.
    """
    (B, T, HV, K), H, steps = log_decay[0].shape, q.shape[2], v.shape[3] // TILE

    def body(*refs):
        q_ref, k_ref, v_ref, coarse_ref, fine_ref, before_ref, d_o_ref, after_ref, d_q_ref, d_k_ref, d_decay_ref = refs[:11]
        v_smem, d_o_smem, before_smem, after_smem, q_smem, k_smem, coarse_smem, fine_smem, met_smem, d_smem, loaded, rest_loaded = refs[11:]
        b, n, h, block = (lax.axis_index(name) for name in ("batch", "chunk", "head", "block"))
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
            (q_ref, q_smem, shared), (k_ref, k_smem, shared), (coarse_ref, coarse_smem, here), (fine_ref, fine_smem, here),
        ):  # fmt: skip
            plgpu.copy_gmem_to_smem(ref.at[where], smem, rest_loaded)

        def contract(d_scores, d_scores_turned, d_reads, d_writes):
            for step in range(steps):
                plgpu.barrier_wait(loaded)
                plgpu.wgmma(d_scores, d_o_smem, v_smem.transpose((1, 0)))
                plgpu.wgmma(d_scores_turned, v_smem, d_o_smem.transpose((1, 0)))
                plgpu.wgmma(d_reads, d_o_smem, before_smem.transpose((1, 0)))
                plgpu.wgmma(d_writes, v_smem, after_smem.transpose((1, 0)))
                if step + 1 < steps:
                    plgpu.wgmma_wait(0)
                    load(step + 1)
            return d_scores[...], d_scores_turned[...], d_reads[...], d_writes[...]

        accumulator = plgpu.ACC((CHUNK, TILE), jnp.float32)
        d_scores, d_scores_turned, d_reads, d_writes = pl.run_scoped(contract, *[accumulator] * 4)
        i, j = positions()
        d_itself = scale * jnp.sum(jnp.where(i == j, d_scores, 0), axis=1)
        d_scores = (scale * jnp.where(i > j, d_scores, d_scores_turned)).astype(jnp.bfloat16)  # for both tokens of a pair

        plgpu.barrier_wait(rest_loaded)
        log_decay = coarse_smem, fine_smem
        d_q = scale * decay_over(j <= i, log_decay) * d_reads
        d_k = decay_over(j > i, log_decay) * d_writes
        # Of the log decay of token t: every pair j < t <= i, the reads of the state from t on, and the writes to it before t. Pairs on one
        # side of t are in both sums of their difference, by the same rounded numbers; a token with itself is in neither.
        from_t = d_smem
        from_t[...] = q_smem[...].astype(jnp.float32) * d_q
        for smem, part in zip((before_smem, after_smem), parts(k_smem[...].astype(jnp.float32) * d_k), strict=True):
            smem[...] = part

        def level(power, d):
            d_q, d_k = d
            s = jnp.left_shift(1, power)
            second = (i & s) != 0
            decay = to_middle(log_decay, s)
            met_smem[...] = _met(q_smem, k_smem, decay, s)
            plgpu.commit_smem()
            d_met = product(jnp.where(meet(i, j, s), d_scores, 0), met_smem)
            through = met_smem[...].astype(jnp.float32) * d_met
            from_t[...] += jnp.where(second, through, -through)
            d_met *= decay
            return d_q + jnp.where(second, d_met, 0), d_k + jnp.where(second, 0, d_met)

        d_q, d_k = lax.fori_loop(0, LEVELS, level, (d_q, d_k))
        for smem, part in zip((v_smem, d_o_smem), parts(from_t[...]), strict=True):
            smem[...] = part
        q, k = q_smem[...].astype(jnp.float32), k_smem[...].astype(jnp.float32)
        q_smem[...] = (d_q + over_rows(d_itself, TILE) * k).astype(jnp.bfloat16)
        k_smem[...] = (d_k + over_rows(d_itself, TILE) * q).astype(jnp.bfloat16)
        plgpu.commit_smem()
        later, earlier = ones(j >= i), ones(j < i)
        d_smem[...] = product(later, v_smem, later, d_o_smem, earlier, before_smem, earlier, after_smem)
        plgpu.commit_smem()
        for smem, ref in ((q_smem, d_q_ref), (k_smem, d_k_ref), (d_smem, d_decay_ref)):
            plgpu.copy_smem_to_gmem(smem, ref.at[here])
        plgpu.wait_smem_to_gmem(0)

    return kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((B, T, HV, K), dtype) for dtype in (jnp.bfloat16, jnp.bfloat16, jnp.float32)),
        scratch_types=[
            *[_tile()] * 9,
            plgpu.SMEM((CHUNK, TILE), jnp.float32, transforms=TILED_FLOAT32),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=4),
        ],
        grid=(B, T // CHUNK, HV, K // TILE),
        grid_names=("batch", "chunk", "head", "block"),
        name="gated_linear_attention_gradients",
    )(q, k, v, *log_decay, before, d_o, after)


def _tile():
    return plgpu.SMEM((CHUNK, TILE), jnp.bfloat16, transforms=TILED)


def _met(q_smem, k_smem, decay, s):
    """[C,64], the keys of first halves and the queries of second halves, at the middle."""
    second = (positions()[0] & s) != 0
    return (jnp.where(second, q_smem[...], k_smem[...]).astype(jnp.float32) * decay).astype(jnp.bfloat16)
