"""What the tokens of a chunk are to each other, by Mosaic GPU, all chunks at once: its scores, and the inverse of its triangular system.

With E_ij = exp(c_i - c_j), c the running sums of the log decays, a chunk of C tokens has

    P_ij = scale * (q_i . k_j) E_ij for j <= i        L_ij = (k_i . k_j) E_ij for j < i        X = (I - B)^-1,  B = -L diag(beta)

The inverse is by doubling: with those of the diagonal blocks of size s in X, and B_s what lies between two of them, X + X B_s X has those
of size 2 s. No power of B is formed: those grow and cancel where keys repeat. Its products take bfloat16 operands, and leave an error
that one step of Newton's, X + (I - X (I - B)) X with B in two parts, squares: to less than X's own rounding to bfloat16.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, Gate, between, call, product, row_of, squares, tile


def pairs(plan, q, k, gates):
    """q, k [B,T,H,K], gates [B,HV,N,GATES,C] -> P, L and X, [B,HV,N,C,C] in bfloat16."""
    B, HV, N = gates.shape[:3]
    square = jax.ShapeDtypeStruct((B, HV, N, CHUNK, CHUNK), jnp.bfloat16)
    return call(
        partial(_kernel, plan),
        q,
        k,
        gates,
        name="pairs",
        out_type=(square, square, square),
        scratch_types=[
            *[tile(CHUNK, q.shape[3])] * 2,
            plgpu.SMEM((len(Gate), CHUNK), jnp.float32),
            *[tile(CHUNK, CHUNK)] * 3,
            [tile(CHUNK, CHUNK)] * 2,
            plgpu.Barrier(num_arrivals=3),
        ],
        grid=(B, HV, N),
        grid_names=("b", "h", "n"),
    )


def _kernel(plan, q_ref, k_ref, gates_ref, scores_ref, lower_ref, inverse_ref, q, k, gates, scores, lower, result, scratch, loaded):
    b, h, n = (platforms.gpu_index(name) for name in "bhn")
    tokens, key_head = pl.ds(n * CHUNK, CHUNK), h // plan.groups
    plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, key_head], k, loaded)
    plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, key_head], q, loaded)
    plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], gates, loaded)
    plgpu.barrier_wait(loaded)

    i, j = squares()
    decay = between(gates)
    below = jnp.where(i > j, product((k, k.T)) * decay, 0.0)
    lower[...] = below.astype(jnp.bfloat16)
    scores[...] = (plan.scale * product((q, k.T)) * decay).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scores, scores_ref.at[b, h, n])
    plgpu.copy_smem_to_gmem(lower, lower_ref.at[b, h, n])
    result[...] = inverse(below * -row_of(gates, Gate.BETA), result, scratch).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, inverse_ref.at[b, h, n])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def inverse(B, result, scratch):
    """X in float32, for B below the diagonal; ``result`` and ``scratch``, two, [C,C] in shared memory, are for right operands."""
    i, j = squares()
    identity = jnp.where(i == j, 1.0, 0.0)
    high, rest = scratch
    rounded = B.astype(jnp.bfloat16)
    high[...], rest[...] = rounded, (B - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
    X = identity + jnp.where(i // 2 == j // 2, B, 0.0)
    size = 2
    while size < CHUNK:
        joined = (i // (2 * size) == j // (2 * size)) & (i // size != j // size)
        left = X.astype(jnp.bfloat16)
        result[...] = left
        plgpu.commit_smem()
        below = jnp.where(joined, product((left, high)), 0.0)
        X = product((below.astype(jnp.bfloat16), result), start=X)
        size *= 2

    left = X.astype(jnp.bfloat16)
    X = left.astype(jnp.float32)
    result[...] = left
    plgpu.commit_smem()
    error = product((left, high), (left, rest), start=identity - X)
    return product((error.astype(jnp.bfloat16), result), start=X)
