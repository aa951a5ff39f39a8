"""What the Mosaic GPU kernels of the gated delta rule share: a chunk's shapes, its gates, and products by the tensor cores."""

from enum import IntEnum

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms

CHUNK = 64
WALKED = 3  # of the rows of :class:`Gate`, those that a walk through the chunks takes
COLUMNS = 64  # columns of a state that a warpgroup has
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def call(body, *operands, name: str, **keywords) -> tuple[jax.Array, ...]:
    """A kernel's results; :func:`.platforms.gpu_call` has the keywords."""
    return platforms.gpu_call(body, name=f"gated_delta_rule_{name}", compiler_params=PARAMS, **keywords)(*operands)


class Gate(IntEnum):
    """Rows of a chunk's gates [GATES,C] float32; c_i are the running sums of its log decays, in two parts."""

    BETA = 0
    SINCE_START = 1  # exp(c_i)
    UNTIL_END = 2  # exp(c_C - c_i)
    COARSE = 3
    FINE = 4


def tile(*shape: int) -> plgpu.SMEM:
    """Shared memory of bfloat16 as the tensor cores read it."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def squares() -> tuple[jax.Array, jax.Array]:
    """i, j [C,C]: the row and the column."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))


def row_of(gates, which: Gate) -> jax.Array:
    """A gate of token j in column j of [C,C]."""
    x = plgpu.layout_cast(gates[which], plgpu.Layout.WGMMA.reduce(0))
    return jax.lax.broadcast_in_dim(x, (CHUNK, CHUNK), [1])


def column_of(gates, which: Gate, columns: int = CHUNK) -> jax.Array:
    """A gate of token i in row i of [C,columns]."""
    x = plgpu.layout_cast(gates[which], plgpu.Layout.WGMMA.reduce(1))
    return jax.lax.broadcast_in_dim(x, (CHUNK, columns), [0])


def between(gates) -> jax.Array:
    """[C,C], exp(c_i - c_j) for j <= i, else 0."""
    i, j = squares()
    coarse, fine = (column_of(gates, part) - row_of(gates, part) for part in (Gate.COARSE, Gate.FINE))
    return jnp.exp(jnp.where(i >= j, coarse + fine, -jnp.inf))


def product(*operands, start: jax.Array | None = None) -> jax.Array:
    """``start`` plus the sum of x y over pairs (x [M,n] in registers or shared memory, y [n,N] in shared memory), float32."""

    def run(total):
        if start is not None:
            total[...] = start
        for x, y in operands:
            plgpu.wgmma(total, x, y)
        return total[...]

    shape = (operands[0][0].shape[0], operands[0][1].shape[1]) if start is None else start.shape
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
