"""The gradients of q, k, beta and decays a channel by those of the states, by Mosaic GPU: all chunks, and PART channels, at once.

With D the gradients, and all else as in :mod:`.gpu_per_channel`, those of the arrays that the walks take are

    D q~ = D o S^T        D k~ = -D v S^T        D k^ = e (D S')^T        D P_ij = D o_i . e_j        D A_ij = -D v_i . e_j

the last two times beta_j, and P's times the scale, for pairs. These go back through the decays to the middles where the pairs met: beta is
with the keys that are read there, so that their gradients but for it, times the keys, are those of beta.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, product, tile
from pallas_kernels.gated_delta_rule.gpu_gradients import PART, Values
from pallas_kernels.gated_linear_attention.gpu_decays import (
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
from pallas_kernels.gated_linear_attention.gpu_layout import TILED_FLOAT32, kernel, over_columns, over_rows


def gradients(plan, q, k, beta, log_decay, total, *walked):
    """q, k [B,T,H,K], beta [B,HV,N,C], log_decay [B,T,HV,K] and total [B,HV,N,K] in float32; ``walked`` as for
    :class:`.gpu_gradients.Values`.

    Returns D q, D k [B,T,HV,K] in bfloat16, D beta [B,HV,N,K/PART,C], of each part of the channels its own, and D log_decay [B,T,HV,K].
    """
    (B, T, HV, K), N, groups = log_decay.shape, beta.shape[2], beta.shape[1] // q.shape[2]

    def body(q_ref, k_ref, log_decay_ref, beta_ref, total_ref, *refs):
        *walked, d_q_ref, d_k_ref, d_beta_ref, d_decay_ref = refs[:9]
        keys, buffers, writes, from_t, beta, d_beta, total, by_state, loaded, values_loaded = refs[9:]
        b, n, h, part = (platforms.gpu_index(name) for name in ("b", "n", "h", "part"))
        values = Values(b, h, n, pl.ds(part * PART, PART), walked, buffers, values_loaded)
        values.load(0)
        for ref, buffer, head in ((q_ref, keys[0], h // groups), (k_ref, keys[1], h // groups), (log_decay_ref, from_t, h)):
            plgpu.copy_gmem_to_smem(ref.at[b, values.tokens, head, values.channels], buffer, loaded)
        plgpu.copy_gmem_to_smem(beta_ref.at[b, h, n], beta, loaded)
        plgpu.copy_gmem_to_smem(total_ref.at[b, h, n, values.channels], total, loaded)

        *met, by_states = values.met()
        i, j = positions()
        by_state[...] = jnp.sum(jnp.where(i == j, by_states, 0), axis=1)
        keys[0][...], keys[1][...], d_beta[...] = _of_keys(plan.scale, met, keys, beta, buffers, writes, from_t, loaded)
        buffers[0][...], buffers[1][...] = parts(from_t[...])
        plgpu.commit_smem()
        later, earlier = ones(j >= i), ones(j < i)
        d_decay = product(*((later, x) for x in buffers[:2]), *((earlier, x) for x in writes))
        from_t[...] = d_decay + over_columns(total[...] * by_state[...], CHUNK)
        plgpu.commit_smem()
        for buffer, ref in ((keys[0], d_q_ref), (keys[1], d_k_ref), (from_t, d_decay_ref)):
            plgpu.copy_smem_to_gmem(buffer, ref.at[b, values.tokens, h, values.channels])
        plgpu.copy_smem_to_gmem(d_beta, d_beta_ref.at[b, h, n, part])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    d_keys, square, row = jax.ShapeDtypeStruct((B, T, HV, K), jnp.bfloat16), tile(CHUNK, PART), plgpu.SMEM((CHUNK,), jnp.float32)
    d_beta = jax.ShapeDtypeStruct((B, HV, N, K // PART, CHUNK), jnp.float32)
    return kernel(
        body,
        out_type=(d_keys, d_keys, d_beta, jax.ShapeDtypeStruct((B, T, HV, K), jnp.float32)),
        scratch_types=[
            [square] * 4,
            [square] * 5,
            [square] * 2,
            plgpu.SMEM((CHUNK, PART), jnp.float32, transforms=TILED_FLOAT32),
            *[row] * 4,
            plgpu.Barrier(num_arrivals=5),
            plgpu.Barrier(num_arrivals=5),
        ],
        grid=(B, N, HV, K // PART),
        grid_names=("b", "n", "h", "part"),
        name="gated_delta_rule_gradients_per_channel",
    )(q, k, log_decay, beta, total, *walked)


def _of_keys(scale, met, keys, beta, buffers, writes, from_t, loaded):
    """D q, D k [C,PART] and D beta [C] by what the values of the chunk met, as :meth:`.gpu_gradients.Values.met` has it.

    Leaves of each channel what its log decay at token t is worth: the sums over t and later tokens of ``from_t``, float32, and over earlier
    ones of the ``writes``, two parts. The former holds every pair at its reader and, taken off, at the token that is read, by the same
    rounded numbers: of the pairs on one side of t nothing is left.
    """
    reads_q, reads_k, d_key, pairs_q, pairs_k = met
    q_smem, k_smem, *log_decay = keys
    d_scores, d_lower, met_q, met_k, spare = buffers
    i, j = positions()
    d_itself = scale * jnp.sum(jnp.where(i == j, pairs_q, 0), axis=1)
    d_scores[...] = jnp.where(i > j, scale * pairs_q, 0).astype(jnp.bfloat16)
    d_lower[...] = jnp.where(i > j, -pairs_k, 0).astype(jnp.bfloat16)

    plgpu.barrier_wait(loaded)
    split(from_t, *log_decay)
    plgpu.commit_smem()
    since_start = decay_over(j <= i, log_decay)
    d_q, d_reader, d_key = scale * since_start * reads_q, -since_start * reads_k, decay_over(j > i, log_decay) * d_key
    from_t[...] = _float32(q_smem) * d_q + _float32(k_smem) * d_reader
    for buffer, part in zip(writes, parts(_float32(k_smem) * over_rows(beta[...], PART) * d_key), strict=True):
        buffer[...] = part

    def level(power, d):
        *d_readers, d_key = d
        s = jnp.left_shift(1, power)
        # As factors: to multiply and add is one instruction, to select and add are two.
        second, across = (i & s) != 0, ones(meet(i, j, s))
        reads, read = jnp.where(second, 1.0, 0.0), jnp.where(second, 0.0, 1.0)
        decay = to_middle(log_decay, s)
        key = _float32(k_smem) * decay * jnp.where(second, 1, over_rows(beta[...], PART))
        met_k[...] = key.astype(jnp.bfloat16)
        met_q[...] = jnp.where(second, _float32(q_smem) * decay, key).astype(jnp.bfloat16)
        plgpu.commit_smem()
        readers = []
        for d_reader, d_pairs, met in zip(d_readers, (d_scores, d_lower), (met_q, met_k), strict=True):
            d_met = product((d_pairs[...] * across, met))
            from_t[...] += _float32(met) * d_met * (reads - read)
            d_met *= decay
            readers.append(d_reader + reads * d_met)
            d_key += read * d_met
        return *readers, d_key

    x, near = since_middle(log_decay)

    # All of it nothing where they are not near: as a way of its own it would cost a kilobyte of spills.
    nothing = jnp.where(near, 0.0, -jnp.inf)
    read, since, until = spare, jnp.exp2(nothing + x), jnp.exp2(nothing - x)
    for reader, met in ((q_smem, met_q), (k_smem, met_k)):
        met[...] = (_float32(reader) * since).astype(jnp.bfloat16)
    read[...] = (_float32(k_smem) * until * over_rows(beta[...], PART)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    d_met = product((d_scores, read))
    from_t[...] += _float32(met_q) * d_met
    d_q += since * d_met
    d_met = product((d_lower, read))
    from_t[...] += _float32(met_k) * d_met
    d_reader += since * d_met
    d_met = product((d_scores.T, met_q), (d_lower.T, met_k))
    from_t[...] -= _float32(read) * d_met
    d_key += until * d_met

    @pl.when(jnp.logical_not(near))
    def _():
        identity = spare
        identity[...] = ones(i == j)
        plgpu.commit_smem()
        for d_pairs in (d_scores, d_lower):
            d_pairs[...] = product((d_pairs.T, identity), start=_float32(d_pairs)).astype(jnp.bfloat16)  # for both tokens of a pair

    d_q, d_reader, d_key = lax.fori_loop(jnp.where(near, LEVELS, 0), LEVELS, level, (d_q, d_reader, d_key))
    q, k, by_beta = _float32(q_smem), _float32(k_smem), over_rows(beta[...], PART)
    d_key += over_rows(d_itself, PART) * q
    d_q += over_rows(d_itself, PART) * by_beta * k
    return d_q.astype(jnp.bfloat16), (d_reader + by_beta * d_key).astype(jnp.bfloat16), jnp.sum(k * d_key, axis=1)


def _float32(ref) -> jax.Array:
    return ref[...].astype(jnp.float32)
