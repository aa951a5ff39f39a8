"""The states between the chunks, by a Mosaic GPU kernel: of the sequence forwards, and their gradients backwards.

A state of a head is cut into tiles of 64 keys and 64 values. Each is walked through the chunks by a warpgroup of its own, in
float32 registers; the chunks' tokens arrive by TMA ahead of it. Where there are fewer tiles than fill the GPU the sequence is cut into
pieces: what each adds to a state that was zero comes first, then all of them start from their states.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.gpu_layout import TILE, TILED, TILED_FLOAT32, kernel, over_rows, product

STAGES = 2  # chunks under way


ENOUGH = 256  # CTAs: two an SM, nearly


def states(x, y, start, *, chunk: int, sums=None, totals=None, reverse: bool = False, scale: float = 1.0):
    """Walks a state through the chunks of C = ``chunk`` tokens, from the last to the first where ``reverse``.

    x: [B,T,H,K], y: [B,T,HV,V], bfloat16, K and V multiples of 64, T of C; start: [B,HV,K,V] float32. Of the decays, in float32, either
    sums: [B,HV,2,T] as :func:`.tpu_decays.running_sums` has them: S' = exp(c_C) S + scale * sum_i w_i x_i y_i^T with w_i = exp(c_C - c_i),
        or where ``reverse`` exp(c_i);
    totals: [B,T/C,HV,K], for x that are decayed already: S' = diag(total) S + scale * sum_i x_i y_i^T.

    Returns (the last S [B,HV,K,V] in float32, S before each step [B,T/C,HV,K,V] in bfloat16).
    """
    B, T, HV, V = y.shape
    N, tiles, pieces = T // chunk, (x.shape[3] // TILE) * (V // TILE), 1
    while pieces * B * HV * tiles < ENOUGH and N % (2 * pieces) == 0 and N >= 4 * pieces:
        pieces *= 2
    if pieces == 1:
        return _walk(x, y, start, sums, totals, chunk, reverse, scale)

    def cut(a):
        return a.reshape(B * pieces, a.shape[1] // pieces, *a.shape[2:])

    x, y = cut(x), cut(y)
    if sums is not None:
        sums = jnp.moveaxis(cut(jnp.moveaxis(sums, 3, 1)), 1, 3)
        total = jnp.exp(jnp.sum(sums[..., chunk - 1 :: chunk], axis=(2, 3)))[..., None]
    else:
        totals = cut(totals)
        total = jnp.prod(totals, axis=1)
    (increments,) = _walk(x, y, jnp.zeros((B * pieces, *start.shape[1:]), jnp.float32), sums, totals, chunk, reverse, scale, keep=False)

    def over(state, piece):
        total, increment = piece
        return total[..., None] * state + increment, state

    by_piece = (jnp.moveaxis(a.reshape(B, pieces, *a.shape[1:]), 1, 0) for a in (total, increments))
    last, starts = jax.lax.scan(over, start, tuple(by_piece), reverse=reverse)
    _, kept = _walk(x, y, jnp.moveaxis(starts, 0, 1).reshape(increments.shape), sums, totals, chunk, reverse, scale)
    return last, kept.reshape(B, N, *kept.shape[2:])


def _walk(x, y, start, sums, totals, chunk, reverse, scale, keep=True):
    """:func:`states` without pieces; with no states but the last where these are not to ``keep``."""
    (B, T, HV, V), (H, K) = y.shape, x.shape[2:]
    N = T // chunk

    def body(x_ref, y_ref, decays_ref, start_ref, last_ref, *rest):
        *kept_refs, state_smem, kept_smem, loaded = rest
        b, h, tile_k, tile_v = (lax.axis_index(name) for name in ("batch", "head", "keys", "values"))
        here = b, h, pl.ds(tile_k * TILE, TILE), pl.ds(tile_v * TILE, TILE)

        def step(indices, x_smem, y_smem, decays_smem, state):
            if keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                kept_smem[...] = state.astype(jnp.bfloat16)
            if sums is not None:
                total = _weigh(y_smem, decays_smem)
            else:
                total = over_rows(decays_smem[...], TILE)
            plgpu.commit_smem()
            for kept_ref in kept_refs:
                plgpu.copy_smem_to_gmem(kept_smem, kept_ref.at[b, at(indices[0]), *here[1:]])
            return total * state + scale * product(x_smem.transpose((1, 0)), y_smem)

        def _weigh(y_smem, sums_smem):
            """Puts the decays until the chunk's end, or since its start, on its tokens; returns the decay of all of it."""
            coarse, fine = (sums_smem[part] for part in (0, 1))
            end_coarse, end_fine = (sums_smem[part, chunk - 1] for part in (0, 1))
            weights = jnp.exp(coarse + fine if reverse else (end_coarse - coarse) + (end_fine - fine))
            y_smem[...] = (y_smem[...].astype(jnp.float32) * over_rows(weights, TILE)).astype(jnp.bfloat16)
            return jnp.exp(end_coarse + end_fine)

        def at(n):
            return N - 1 - n if reverse else n

        tokens = None, chunk, None, TILE
        if sums is not None:
            decays = plgpu.BlockSpec((None, None, 2, chunk), lambda n: (b, h, 0, at(n)))
        else:
            decays = plgpu.BlockSpec((None, None, None, TILE), lambda n: (b, at(n), h, tile_k))
        plgpu.copy_gmem_to_smem(start_ref.at[here], state_smem, loaded)
        plgpu.barrier_wait(loaded)
        state_smem[...] = plgpu.emit_pipeline(
            step,
            grid=(N,),
            in_specs=[
                plgpu.BlockSpec(tokens, lambda n: (b, at(n), h // (HV // H), tile_k), transforms=TILED),
                plgpu.BlockSpec(tokens, lambda n: (b, at(n), h, tile_v), transforms=TILED),
                decays,
            ],
            max_concurrent_steps=min(STAGES, N),
            init_carry=state_smem[...],
        )(x_ref, y_ref, decays_ref)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_smem, last_ref.at[here])
        plgpu.wait_smem_to_gmem(0)

    last, kept = jax.ShapeDtypeStruct(start.shape, jnp.float32), jax.ShapeDtypeStruct((B, N, HV, K, V), jnp.bfloat16)
    return kernel(
        body,
        out_type=(last, kept) if keep else (last,),
        scratch_types=[
            plgpu.SMEM((TILE, TILE), jnp.float32, transforms=TILED_FLOAT32),
            plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=TILED),
            plgpu.Barrier(),
        ],
        grid=(B, HV, K // TILE, V // TILE),
        grid_names=("batch", "head", "keys", "values"),
        name="gated_linear_attention_states",
    )(x, y, totals if sums is None else sums, start)
