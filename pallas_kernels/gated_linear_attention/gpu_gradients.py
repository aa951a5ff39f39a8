"""The gradients of q, k and the decays where these are a head, by Mosaic GPU: chunks of 128 tokens, between which nothing is carried.

With S the state before a chunk and D the gradient of that after it, c_i the sum of the log decays since the chunk's start,

    dq_i = scale * (exp(c_i) S do_i + sum_{j<=i} (do_i . v_j) exp(c_i - c_j) k_j)
    dk_j = exp(c_C - c_j) D v_j + scale * sum_{i>=j} (do_i . v_j) exp(c_i - c_j) q_i

A CTA has 64 channels of the keys, and takes chunk after chunk of its piece of the sequence: a warpgroup loads ahead, one has the first 64
tokens and one the last 64. The first one's dk and the last one's dq meet tokens of both halves (here the *wide* gradient), the other two
only their own half's (the *narrow*): so both do the same, and no block of 64 by 64 tokens is computed that do not meet.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_linear_attention.gpu_layout import TILE, TILED, laid_out_kernel, loaded, over_columns, over_rows, product

CHUNK = 2 * TILE
SLOTS = 3  # slices of 64 channels of the values under way
ENOUGH = 256  # CTAs, one a multiprocessor at a time


def gradients(q, k, v, sums, states, d_o, d_states, *, scale: float):
    """q, k [B,T,H,K], v, d_o [B,T,HV,V] bfloat16, T of N whole chunks; sums [B,N,HV,2,C] float32, the c_i in two parts; states before and
    gradients after each chunk [B,N,HV,K,V] bfloat16.

    Returns dq, dk [B,T,HV,K] in bfloat16, and in float32 [B,N,HV,K/64,3,C]: what a token's log decay has of the tokens from it on, and of
    those before it, and <S, D> in parts; to be added up over the K/64.
    """
    (B, T, HV, V), K, N = v.shape, q.shape[3], sums.shape[1]
    chunks = -(-N // -(-ENOUGH // (B * HV * K // TILE)))  # of a piece: the last one's may be fewer
    found = jax.ShapeDtypeStruct((B, T, HV, K), jnp.bfloat16)
    return laid_out_kernel(
        partial(_kernel, N, chunks, V // TILE, scale),
        name="gated_linear_attention_gradients",
        out_type=(found, found, jax.ShapeDtypeStruct((B, N, HV, K // TILE, 3, CHUNK), jnp.float32)),
        scratch_types=[
            [_tiles(SLOTS, 2, CHUNK), _tiles(SLOTS, 2, TILE)],
            [_tiles(2, CHUNK), plgpu.SMEM((2, CHUNK), jnp.float32)],
            [_tiles(2, CHUNK), plgpu.SMEM((2, 3, TILE), jnp.float32)],
            [plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS), plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS)],
            [plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=2)],
        ],
        grid=(B, HV, -(-N // chunks), K // TILE),
        grid_names=("b", "h", "piece", "block"),
        num_threads=3,
        thread_name="warpgroup",
    )(v, d_o, states, d_states, q, k, sums)


def _tiles(*shape):
    return plgpu.SMEM((*shape, TILE), jnp.bfloat16, transforms=TILED)


def _kernel(N, chunks, slices, scale, *refs):
    sources, results, scratch = refs[:7], refs[7:10], refs[10:]
    w, first = lax.axis_index("warpgroup"), platforms.gpu_index("piece") * chunks
    count = jnp.int32(chunks) if N % chunks == 0 else jnp.minimum(chunks, N - first)
    pl.when(w == 2)(lambda: _load(chunks, count, slices, sources, *scratch))
    pl.when(w < 2)(lambda: _compute(chunks, count, slices, scale, results, *scratch))


def _load(chunks, count, slices, sources, slots, rest, _, slot_barriers, rest_barriers):
    v_ref, d_o_ref, states_ref, d_states_ref, q_ref, k_ref, sums_ref = sources
    (values, states), (keys, sums), (full, free), (rest_full, rest_free) = slots, rest, slot_barriers, rest_barriers
    plgpu.set_max_registers(24, action="decrease")

    def fetch(m, _):
        n = platforms.gpu_index("piece") * chunks + m
        b, h, block = (platforms.gpu_index(name) for name in ("b", "h", "block"))
        tokens, channels = pl.ds(n * CHUNK, CHUNK), pl.ds(block * TILE, TILE)
        for s in range(slices):
            step, columns = m * slices + s, pl.ds(s * TILE, TILE)
            slot = lax.rem(step, jnp.int32(SLOTS))
            pl.when(step >= SLOTS)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))
            for which, ref in enumerate((v_ref, d_o_ref)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, h, columns], values.at[slot, which], full.at[slot])
            for which, ref in enumerate((d_states_ref, states_ref)):
                plgpu.copy_gmem_to_smem(ref.at[b, n, h, channels, columns], states.at[slot, which], full.at[slot])
        pl.when(m >= 1)(lambda: plgpu.barrier_wait(rest_free))
        for which, ref in enumerate((q_ref, k_ref)):
            head = h // (platforms.gpu_size("h") // ref.shape[2])
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, head, channels], keys.at[which], rest_full)
        plgpu.copy_gmem_to_smem(sums_ref.at[b, n, h], sums, rest_full)

    lax.fori_loop(jnp.int32(0), count, fetch, None)

    @pl.loop(jnp.maximum(count * slices - SLOTS, 0), count * slices)
    def _(step):
        plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(SLOTS))])

    plgpu.barrier_wait(rest_free)


def _compute(chunks, count, slices, scale, results, slots, rest, buffers, slot_barriers, rest_barriers):
    d_q_ref, d_k_ref, products_ref = results
    (values, states), (keys, sums), (found, products) = slots, rest, buffers
    (full, free), (rest_full, rest_free) = slot_barriers, rest_barriers
    plgpu.set_max_registers(240, action="increase")

    def chunk(m, _):
        n = platforms.gpu_index("piece") * chunks + m
        b, h, block = (platforms.gpu_index(name) for name in ("b", "h", "block"))
        g = lax.axis_index("warpgroup")
        own, others = pl.ds(g * TILE, TILE), pl.ds((1 - g) * TILE, TILE)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        of_states = products.at[g, 2]
        of_states[...] = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))

        def contract(wide_state, narrow_state, met_own, met_other):
            @pl.loop(jnp.int32(0), jnp.int32(slices))
            def _(s):
                slot = lax.rem(m * slices + s, jnp.int32(SLOTS))
                plgpu.barrier_wait(full.at[slot])
                wide, narrow = values.at[slot, g, own], values.at[slot, 1 - g, own]
                plgpu.wgmma(wide_state, wide, states.at[slot, g].T)
                plgpu.wgmma(narrow_state, narrow, states.at[slot, 1 - g].T)
                plgpu.wgmma(met_own, wide, narrow.T)
                plgpu.wgmma(met_other, wide, values.at[slot, 1 - g, others].T)

                @pl.when(lax.rem(s, jnp.int32(2)) == g)
                def _():
                    both = [loaded(states.at[slot, which]).astype(jnp.float32) for which in (0, 1)]
                    of_states[...] = loaded(of_states, 1) + jnp.sum(both[0] * both[1], axis=1)

                plgpu.wgmma_wait(0)
                plgpu.commit_smem()  # what was read here comes before what TMA, another proxy, writes there next
                plgpu.barrier_arrive(free.at[slot])
            return wide_state[...], narrow_state[...], met_own[...], met_other[...]

        wide_state, narrow_state, met_own, met_other = pl.run_scoped(contract, *[plgpu.ACC((TILE, TILE), jnp.float32)] * 4)
        plgpu.barrier_wait(rest_full)
        pairs_own, pairs_other, itself = _pairs(met_own, met_other, sums, g, scale)
        turned = found.at[1, own]
        turned[...] = pairs_own
        plgpu.commit_smem()
        wide_weight, narrow_weight = _weights(sums, g, scale)
        q_or_k, k_or_q = keys.at[1 - g, own], keys.at[g, own]  # what the wide gradient is of, and what the narrow one is of
        wide_tokens = product(pairs_own, k_or_q, pairs_other, keys.at[g, others])
        narrow_tokens = product(turned.T, q_or_k)
        wide = _gradient(wide_state, wide_tokens, wide_weight, itself, q_or_k, k_or_q, found.at[0, own])
        narrow = _gradient(narrow_state, narrow_tokens, narrow_weight, itself, k_or_q, q_or_k, found.at[1, own])
        products[g, 0] = jnp.where(g == 0, narrow[0], wide[0]) + jnp.where(g == 0, narrow[1] - wide[1], wide[1] - narrow[1])
        products[g, 1] = jnp.where(g == 0, wide[0], narrow[0])
        plgpu.commit_smem()
        plgpu.barrier_arrive(rest_free)
        here, channels = pl.ds(n * CHUNK + g * TILE, TILE), pl.ds(block * TILE, TILE)
        for group, refs in enumerate(((d_k_ref, d_q_ref), (d_q_ref, d_k_ref))):

            @pl.when(g == group)
            def _(refs=refs):
                for which, ref in enumerate(refs):
                    plgpu.copy_smem_to_gmem(found.at[which, own], ref.at[b, here, h, channels])

        plgpu.copy_smem_to_gmem(products.at[g], products_ref.at[b, n, h, block, :, own])

    lax.fori_loop(jnp.int32(0), count, chunk, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _pairs(met_own, met_other, sums, g, scale):
    """[64,64] each, the products of own tokens with their own and with the other half's, with the decays between them, in bfloat16; and
    [64] those of a token with itself, which are not in the first."""
    own, others = pl.ds(g * TILE, TILE), pl.ds((1 - g) * TILE, TILE)
    i, j = (plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    sign = 2.0 * g.astype(jnp.float32) - 1  # of c_i - c_j, for the pairs that meet

    def decay(columns):
        ours = [over_rows(loaded(sums.at[part, own], 1), TILE) for part in (0, 1)]
        theirs = [over_columns(loaded(sums.at[part, columns], 0), TILE) for part in (0, 1)]
        return sign * ((ours[0] - theirs[0]) + (ours[1] - theirs[1]))

    itself = scale * jnp.sum(jnp.where(i == j, met_own, 0.0), axis=1)
    pairs_own = met_own * (scale * jnp.exp(jnp.where((2 * g - 1) * (i - j) > 0, decay(own), -jnp.inf)))
    pairs_other = met_other * (scale * jnp.exp(decay(others)))
    return pairs_own.astype(jnp.bfloat16), pairs_other.astype(jnp.bfloat16), itself


def _weights(sums, g, scale):
    """[64] each, the decays between the tokens and the states that the wide and the narrow gradients read."""
    coarse, fine = (loaded(sums.at[part, pl.ds(g * TILE, TILE)], 1) for part in (0, 1))
    since_start = scale * jnp.exp(coarse + fine)
    until_end = jnp.exp((sums[0, CHUNK - 1] - coarse) + (sums[1, CHUNK - 1] - fine))
    return jnp.where(g == 0, until_end, since_start), jnp.where(g == 0, since_start, until_end)


def _gradient(state, tokens, weight, itself, of, partner, out):
    """Writes a gradient of ``of`` [64,64]; returns the sums [64] of its products with what it has of the state and of other tokens."""
    state *= over_rows(weight, TILE)
    operand = loaded(of).astype(jnp.float32)
    out[...] = (state + tokens + over_rows(itself, TILE) * loaded(partner).astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.sum(operand * state, axis=1), jnp.sum(operand * tokens, axis=1)
