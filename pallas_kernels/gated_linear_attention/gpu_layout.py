"""How values lie in the registers and the shared memory of the Hopper kernels of gated linear attention."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms

TILE = 64  # rows of a product of one warpgroup, and the columns of bfloat16 that a line of 128 bytes holds
TILED = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))  # what wgmma reads, of [rows, a multiple of TILE]
TILED_FLOAT32 = (plgpu.TilingTransform((8, TILE // 2)), plgpu.SwizzleTransform(128))

# Layouts of values in registers are inferred, or, where warpgroups do different things, said: by ``loaded``.
_INFERRED = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
_SAID = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
kernel = partial(platforms.gpu_call, compiler_params=_INFERRED)
laid_out_kernel = partial(platforms.gpu_call, compiler_params=_SAID)


def loaded(ref, summed_over: int | None = None) -> jax.Array:
    """To registers as the tensor cores have results; [64] as one of them that has been summed over an axis."""
    layout = plgpu.Layout.WGMMA
    return plgpu.layout_cast(ref[...], layout if summed_over is None else layout.reduce(summed_over))


def over_rows(x: jax.Array, columns: int) -> jax.Array:
    """[M] -> [M,columns]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def over_columns(x: jax.Array, rows: int) -> jax.Array:
    """[N] -> [rows,N]."""
    return jax.lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def product(*operands, start: jax.Array | None = None) -> jax.Array:
    """The sum of a b over the ``operands`` a, b, a, b ..., and ``start``: [M,N] in float32.

    a [M,.], in registers or shared memory, b [.,N], in shared memory, are bfloat16.
    """
    pairs = list(zip(operands[::2], operands[1::2], strict=True))

    def multiply(accumulator):
        if start is not None:
            accumulator[...] = start
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    shape = (pairs[0][0].shape[0], pairs[0][1].shape[1]) if start is None else start.shape
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def summed(d: jax.Array, x: jax.Array) -> jax.Array:
    """The gradient by a head of x [B,T,H,K], of those [B,T,HV,K] through each value head that reads it."""
    return jnp.sum(d.reshape(*x.shape[:3], -1, x.shape[3]), axis=3, dtype=jnp.float32).astype(x.dtype)
