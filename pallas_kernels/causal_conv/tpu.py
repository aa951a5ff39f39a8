"""The short convolution as Mosaic TPU kernels that read x (and dy) once and write y (dx) once, with sums in float32 registers.

The grid is (B, blocks of channels, chunks of T). A chunk is widened to float32 in VMEM, a column of 128 channels at a time, below the
8 tokens before it: what lies k tokens before 8 tokens, a register, is then a load at an offset, and no shift is computed. Those 8 are a
small block of x of their own, or the state, so that forward has no order between chunks. Backward goes from the last chunk to the first.
It recomputes the sums s, keeps their gradients ds in VMEM, above the first 8 of the chunk after, and with w_k the weight of what is k
tokens before:

    ds_t = dy_t act'(s_t)    dx_t = sum_k w_k ds_{t+k}    dw_k = sum_t ds_{t+k} x_t

Documents and padding are a bit a token for each distance k, whether what lies there counts. XLA puts them into one word a token, and the
kernel turns these, time from lanes to sublanes, and makes a mask of ones or zeros of each bit, once for all columns of a block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import checks, platforms
from pallas_kernels.causal_conv import vjp

TAPS = 4  # at most
LANES = 128  # of a vector register
REACH = 8  # tokens before a chunk that are at hand, and after it: the sublanes of a register
ROWS = 16  # of a tile of bfloat16


class Chunk(NamedTuple):
    """tokens: of a step of the grid, a multiple of 128. row_bytes: the width of its block, some columns of 128 channels."""

    tokens: int
    row_bytes: int

    def within(self, T: int) -> "Chunk":
        """The least chunk of which a sequence takes no more than of this one."""
        return self._replace(tokens=LANES * pl.cdiv(T, LANES * pl.cdiv(T, self.tokens)))


CHUNK = Chunk(tokens=1024, row_bytes=1024)


def is_faster(x: jax.Array, weight: jax.Array) -> bool:
    """Whether this kernel is the fastest measured implementation on TPU for such arrays."""
    return x.dtype in checks.KERNEL_DTYPES and x.shape[1] > 0 and x.shape[2] % LANES == 0 and weight.shape[1] <= TAPS


def causal_conv(x, weight, activation, initial_state, segments):
    """See api.py. Raises ValueError for an x that is not float32 or bfloat16, that has no token, and for more than 4 taps."""
    checks.check_kernel_dtypes("causal_conv", x=x)
    if x.shape[1] == 0 or weight.shape[1] > TAPS:
        needed = f"T >= 1 and at most {TAPS} taps for implementation='pallas'"
        raise ValueError(f"causal_conv: x has shape {x.shape} and weight {weight.shape}, need {needed}")
    return vjp.causal_conv(PASSES, x, weight, activation, initial_state, segments)


class _Blocks(NamedTuple):
    """The grid, and the block of each kind of array that a step of it works on; where ``reverse``, the last chunk comes first."""

    grid: tuple[int, int, int]
    sequence: pl.BlockSpec  # [B,T,D]
    before: pl.BlockSpec  # [B,T,D], what ends where the block of ``sequence`` begins
    edge: pl.BlockSpec  # [B,8,D]
    weight: pl.BlockSpec  # [W,D]
    dweight: pl.BlockSpec  # [B,W,D]
    bits: pl.BlockSpec  # [B,1,T]
    extended: pltpu.VMEM  # a column of a chunk and the 8 tokens beside it
    masks: pltpu.VMEM  # of a column of a chunk


def _blocks(chunk: Chunk, x: jax.Array, taps: int, masks: int, reverse: bool) -> _Blocks:
    B, T, D = x.shape
    C, N, column = chunk.tokens, pl.cdiv(T, chunk.tokens), min(D, LANES)
    width = column * min(chunk.row_bytes // (column * x.dtype.itemsize), pl.cdiv(D, column))

    def at(n):
        return N - 1 - n if reverse else n

    return _Blocks(
        (B, pl.cdiv(D, width), N),
        pl.BlockSpec((1, C, width), lambda b, d, n: (b, at(n), d)),
        pl.BlockSpec((1, ROWS, width), lambda b, d, n: (b, jnp.maximum(at(n) * (C // ROWS) - 1, 0), d)),
        pl.BlockSpec((1, REACH, width), lambda b, d, n: (b, 0, d)),
        pl.BlockSpec((taps, width), lambda b, d, n: (0, d)),
        pl.BlockSpec((1, taps, width), lambda b, d, n: (b, 0, d)),
        pl.BlockSpec((1, 1, C), lambda b, d, n: (b, 0, at(n))),
        pltpu.VMEM((REACH + C, column), jnp.float32),
        pltpu.VMEM((masks, C, column), jnp.int32),
    )


def _forward(activation, x, weight, state, index):
    """See vjp.Passes. Padding, if it is told apart by an index of -1, is not seen, and its y is 0."""
    chunk, W = CHUNK.within(x.shape[1]), weight.shape[1]
    bits = () if index is None else (_bits(index, range(W), chunk),)
    blocks = _blocks(chunk, x, W, W, reverse=False)
    (y,) = platforms.pallas_call(
        partial(_forward_kernel, activation),
        name="causal_conv_forward",
        grid=blocks.grid,
        in_specs=[blocks.sequence, blocks.before, blocks.edge, blocks.weight, *[blocks.bits] * len(bits)],
        out_specs=[blocks.sequence],
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype),),
        scratch_shapes=[blocks.extended, *[blocks.masks] * len(bits)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=_cost(x, arrays=2, flops=2 * W),
    )(x, x, _edge(state), weight.T * _factor(activation), *bits)
    return y


def _backward(activation, x, weight, state, index, dy):
    """See vjp.Passes. Padding, if it is told apart by an index of -1, is not seen, and its dx is 0."""
    (B, T, D), W = x.shape, weight.shape[1]
    chunk, factor = CHUNK.within(T), _factor(activation)
    bits = () if index is None else (_bits(index, [*range(W), *range(-1, -W, -1)], chunk),)
    blocks = _blocks(chunk, x, W, 2 * W - 1, reverse=True)
    dx, dweight, dsums = platforms.pallas_call(
        partial(_backward_kernel, activation, T),
        name="causal_conv_backward",
        grid=blocks.grid,
        in_specs=[blocks.sequence, blocks.before, blocks.edge, blocks.weight, blocks.sequence, *[blocks.bits] * len(bits)],
        out_specs=[blocks.sequence, blocks.dweight, blocks.edge],
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((B, W, D), jnp.float32),
            jax.ShapeDtypeStruct((B, REACH, D), jnp.float32),
        ),
        scratch_shapes=[blocks.extended, blocks.extended, *[blocks.masks] * len(bits)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(x, arrays=3, flops=6 * W),
    )(x, x, _edge(state), weight.T * factor, dy, *bits)

    # The state, which is before all chunks.
    dsums = dsums[:, : W - 1]
    if index is not None:
        dsums = jnp.where(jnp.pad(index == 0, [(0, 0), (0, W - 1)])[:, : W - 1, None], dsums, 0)
    _, pull = jax.vjp(_sums_of_state, weight, state)
    dweight_of_state, dstate = pull(factor * dsums)
    return dx, factor * jnp.sum(dweight, axis=0).T + dweight_of_state, dstate


PASSES = vjp.Passes(_forward, _backward)


def _factor(activation):
    """Of the weights, sums and gradients of sums that the kernels work with: SiLU is h + h tanh(h) of h = s / 2.

    That rounds to float32 at the size of s, also where SiLU is next to 0.
    """
    return 0.5 if activation == "silu" else 1.0


def _edge(state):
    """[B,W-1,D] as the last of 8 tokens."""
    return jnp.pad(state, [(0, 0), (REACH - state.shape[1], 0), (0, 0)])


def _sums_of_state(weight, state):
    """What the state adds to the first W-1 sums [B,W-1,D]."""
    kept = state.shape[1]
    state = jnp.pad(state, [(0, 0), (0, kept), (0, 0)])
    return sum(weight[:, w] * state[:, w : w + kept] for w in range(kept + 1))


def _bits(index, distances, chunk):
    """[B,1,T] int32, T padded to chunks. Its m-th bit: whether the token ``distances[m]`` before (negative: after) is of the same document.

    At padding all are 0. The state, before all tokens, is of document 0; after the last token there is none.
    """
    T, reach = index.shape[1], max(distances)
    extended = jnp.pad(index, [(0, 0), (reach, 0)])
    extended = jnp.pad(extended, [(0, 0), (0, reach)], constant_values=-1)
    same = [(extended[:, reach - k : reach - k + T] == index) & (index >= 0) for k in distances]
    bits = sum(one.astype(jnp.int32) << m for m, one in enumerate(same))
    return jnp.pad(bits, [(0, 0), (0, -T % chunk.tokens)])[:, None]


def _cost(x, arrays, flops) -> pl.CostEstimate:
    """``arrays`` like x are moved, with so many FLOPs an element; XLA's own estimates take it from here."""
    return pl.CostEstimate(flops=flops * x.size, bytes_accessed=arrays * x.size * x.dtype.itemsize, transcendentals=x.size)


def _forward_kernel(activation, x_ref, before_ref, state_ref, weight_ref, *refs):
    bits_ref, y_ref, extended, masks = refs if len(refs) == 4 else (None, *refs, None)
    n = pl.program_id(2)
    _spread(bits_ref, masks)

    def column(lanes):
        _extend(x_ref, before_ref, state_ref, lanes, n, extended, masks)
        s = _sums(extended, _weights(weight_ref, lanes), masks)
        y = s + s * jnp.tanh(s) if activation == "silu" else s
        y_ref[0, :, lanes] = y.astype(y_ref.dtype)

    _each_column(x_ref.shape[2], column)


def _backward_kernel(activation, T, x_ref, before_ref, state_ref, weight_ref, dy_ref, *refs):
    bits_ref, dx_ref, dweight_ref, after_ref, extended, dsums, masks = refs if len(refs) == 7 else (None, *refs, None)
    C, W = x_ref.shape[1], weight_ref.shape[0]
    n = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        after_ref[...] = jnp.zeros_like(after_ref)
        dweight_ref[...] = jnp.zeros_like(dweight_ref)

    _spread(bits_ref, masks)

    def column(lanes):
        _extend(x_ref, before_ref, state_ref, lanes, n, extended, masks)
        weights = _weights(weight_ref, lanes)
        ds = dy_ref[0, :, lanes].astype(jnp.float32)
        if activation == "silu":
            s = _sums(extended, weights, masks)
            tanh = jnp.tanh(s)
            ds *= (1 + tanh) * (1 + s * (1 - tanh))
        dsums[:C, :] = _masked(ds, masks, 0)
        dsums[C:, :] = after_ref[0, :, lanes]
        _end(T, n, C, (extended, REACH), (dsums, 0))

        x, dx = extended[REACH:, :], 0
        for k, weight in enumerate(weights):
            ds = dsums[k : k + C, :]
            ds = ds if k == 0 else _masked(ds, masks, W - 1 + k)
            dx += weight * ds
            dweight_ref[0, W - 1 - k : W - k, lanes] += jnp.sum(ds * x, axis=0, keepdims=True)
        dx_ref[0, :, lanes] = dx.astype(dx_ref.dtype)
        after_ref[0, :, lanes] = dsums[:REACH, :]

    _each_column(x_ref.shape[2], column)


def _each_column(width, body):
    """body(lanes) for the columns of 128 channels of a block."""
    column = min(width, LANES)

    @pl.loop(0, width // column)
    def _(c):
        body(pl.ds(pl.multiple_of(c * column, column), column))


def _spread(bits_ref, masks):
    """Bits [1,1,C] to masks [M,C,column] of the least M of them, a token's in all lanes."""
    if masks is None:
        return
    M, C, column = masks.shape
    for begin in range(0, C, LANES):
        words = jnp.broadcast_to(bits_ref[0, :, begin : begin + LANES], (LANES, LANES)).T[:, :column]
        for m in range(M):
            masks[m, begin : begin + LANES, :] = (words << (31 - m)) >> 31


def _masked(x, masks, m):
    """x [C,column], zero where the m-th mask is."""
    if masks is None:
        return x
    words = jax.lax.bitcast_convert_type(x, jnp.int32) & masks[m]
    return jax.lax.bitcast_convert_type(words, jnp.float32)


def _extend(x_ref, before_ref, state_ref, lanes, n, extended, masks):
    """The 8 tokens before chunk ``n`` and, without padding, those of it."""
    before = before_ref[0, ROWS - REACH :, lanes].astype(jnp.float32)
    extended[:REACH, :] = jnp.where(n == 0, state_ref[0, :, lanes], before)
    extended[REACH:, :] = _masked(x_ref[0, :, lanes].astype(jnp.float32), masks, 0)


def _weights(weight_ref, lanes):
    """The weights [1,column] of the token itself, the one before, ..."""
    W = weight_ref.shape[0]
    return [weight_ref[W - 1 - k : W - k, lanes] for k in range(W)]


def _sums(extended, weights, masks):
    """The sums [C,column] of a chunk."""
    C = extended.shape[0] - REACH
    taps = [extended[REACH - k : REACH - k + C, :] for k in range(len(weights))]
    taps[1:] = [_masked(tap, masks, k) for k, tap in enumerate(taps[1:], 1)]
    return sum(weight * tap for weight, tap in zip(weights, taps, strict=True))


def _end(T, n, C, *scratches):
    """(scratch, its first row): zeros for the tokens of chunk ``n`` that lie beyond T, if it is the last."""
    inside = T % C
    if inside:
        for scratch, first in scratches:
            rows = slice(first + inside, first + C)
            scratch[rows, :] = jnp.where(n == T // C, 0, scratch[rows, :])
