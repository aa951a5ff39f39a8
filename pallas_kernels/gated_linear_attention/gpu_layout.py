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

# Layouts of values in registers are inferred: what a kernel says of them, the interpreter does not understand.
_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
kernel = partial(platforms.gpu_call, compiler_params=_PARAMS)


def over_rows(x: jax.Array, columns: int) -> jax.Array:
    """[M] -> [M,columns]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def over_columns(x: jax.Array, rows: int) -> jax.Array:
    """[N] -> [rows,N]."""
    return jax.lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def product(a, b, *more) -> jax.Array:
    """a [M,.], in registers or shared memory, times b [.,N] in shared memory, both bfloat16: [M,N] in float32.

    more: further a and b, whose products are added.
    """
    pairs = [(a, b), *zip(more[::2], more[1::2], strict=True)]

    def multiply(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def summed(d: jax.Array, x: jax.Array) -> jax.Array:
    """The gradient by a head of x [B,T,H,K], of those [B,T,HV,K] through each value head that reads it."""
    return jnp.sum(d.reshape(*x.shape[:3], -1, x.shape[3]), axis=3, dtype=jnp.float32).astype(x.dtype)
