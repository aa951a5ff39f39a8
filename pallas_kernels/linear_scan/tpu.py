"""h_t = a_t * h_{t-1} + x_t as a Mosaic TPU kernel that reads and writes each element once, forward and backward.

The grid is (B, blocks of 128 channels, chunks of T); chunks run in order, the state between them in VMEM. A chunk is 8 G runs
of consecutive tokens, and a vector register holds one token of each of 8 runs, so that the recurrence takes steps of 8 tokens
in G independent chains. As a run's first state is not known yet, there are two passes over a chunk in VMEM: the first finds
what each run does to a state, h -> P h + r; combining those gives the state each run begins with; the second writes h.

The backward pass recomputes the states of a chunk from the state before it, which forward keeps, and runs the recurrence of
the gradients in the other direction, with u_t = a_{t+1} e_{t+1} between the tokens:

    e_t = dh_t + u_t    dx_t = e_t    da_t = e_t h_{t-1}    u_{t-1} = a_t e_t

So it reads a, x and dh and writes da and dx, once. Tokens of the last chunk that lie beyond T keep the state they are given.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import checks, platforms

ROWS = 8  # sublanes of a vector register
LANES = 128  # and its lanes
UNROLL = 4  # steps of a loop side by side, so that loads of one do not wait for the stores of another


class Chunk(NamedTuple):
    """span: consecutive tokens that a row of vector registers goes through, an even number.
    groups: G, the runs they are cut into.
    row_bytes: the width of a block of the grid, some columns of 128 channels, in the wider of the arrays.
    """

    span: int
    groups: int
    row_bytes: int

    @property
    def tokens(self) -> int:
        return ROWS * self.span

    @property
    def pitch(self) -> int:
        """Odd, so that the 8 tokens of a step lie in the 8 banks of VMEM and are loaded at once."""
        return self.span + 1

    def within(self, T: int) -> "Chunk":
        """This chunk, or for a short sequence the least power of two that holds it."""
        span = min(self.span, max(8, pl.next_power_of_2(pl.cdiv(T, ROWS))))
        return self._replace(span=span, groups=min(self.groups, span // 8))

    @property
    def steps(self) -> int:
        return self.span // self.groups

    def rows(self, token: int):
        """Where in a buffer the 8 tokens are that are ``token`` within their rows of runs."""
        return pl.ds(token, ROWS, stride=self.pitch)


# The fastest chunk without spills, and that of some generations.
DEFAULT = Chunk(span=128, groups=8, row_bytes=1024)
TUNED = {"v4": DEFAULT._replace(groups=4)}  # which has half the registers


def is_faster(decay: jax.Array, x: jax.Array) -> bool:
    """Whether this kernel is the fastest measured implementation on TPU for such arrays."""
    return all(a.dtype in checks.KERNEL_DTYPES for a in (decay, x))


def linear_scan(decay: jax.Array, x: jax.Array, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """decay, x [B,T,D] in float32 or bfloat16, initial_state [B,D] -> (h [B,T,D] in x's dtype, the final state [B,D] in float32).

    Raises ValueError for other dtypes.
    """
    checks.check_kernel_dtypes("linear_scan", decay=decay, x=x)
    chunk = TUNED.get(platforms.generation(), DEFAULT).within(x.shape[1])
    h, final_state = _scan(chunk, decay, x, initial_state.astype(jnp.float32)[:, None])
    return h, final_state[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, decay, x, initial_state):
    """initial and final state are [B,1,D]."""
    h, final_state, _ = _forward_call(chunk, decay, x, initial_state)
    return h, final_state


def _scan_forward(chunk, decay, x, initial_state):
    h, final_state, starts = _forward_call(chunk, decay, x, initial_state)
    return (h, final_state), (decay, x, starts)


def _scan_backward(chunk, residuals, cotangents):
    return tuple(_backward_call(chunk, *residuals, *cotangents))


_scan.defvjp(_scan_forward, _scan_backward)


class _Blocks(NamedTuple):
    """The grid, and the block of each kind of array that a step of it works on; where ``reverse``, the last chunk comes first."""

    grid: tuple[int, int, int]
    sequence: pl.BlockSpec  # [B,T,D]
    state: pl.BlockSpec  # [B,1,D]
    starts: pl.BlockSpec  # [B,N,1,D], the state before each chunk
    scratch: Callable  # the number of [8 span,128] buffers -> scratch shapes: the state, the buffers


def _blocks(chunk: Chunk, decay: jax.Array, x: jax.Array, reverse: bool) -> _Blocks:
    B, T, D = x.shape
    N, column = pl.cdiv(T, chunk.tokens), min(D, LANES)
    itemsize = max(decay.dtype.itemsize, x.dtype.itemsize)
    width = column * min(chunk.row_bytes // (column * itemsize), pl.cdiv(D, column))

    def at(n):
        return N - 1 - n if reverse else n

    return _Blocks(
        (B, pl.cdiv(D, width), N),
        pl.BlockSpec((1, chunk.tokens, width), lambda b, d, n: (b, at(n), d)),
        pl.BlockSpec((1, 1, width), lambda b, d, n: (b, 0, d)),
        pl.BlockSpec((1, 1, 1, width), lambda b, d, n: (b, at(n), 0, d)),
        lambda buffers: [
            pltpu.VMEM((1, width), jnp.float32),
            *[pltpu.VMEM((ROWS * chunk.pitch, column), jnp.float32)] * buffers,
        ],
    )


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _forward_call(chunk, decay, x, initial_state):
    """(h [B,T,D], final state [B,1,D], the states before each chunk [B,N,1,D])."""
    B, T, D = x.shape
    blocks = _blocks(chunk, decay, x, reverse=False)
    return platforms.pallas_call(
        partial(_forward_kernel, chunk, T),
        name="linear_scan_forward",
        grid=blocks.grid,
        in_specs=[blocks.sequence, blocks.sequence, blocks.state],
        out_specs=[blocks.sequence, blocks.state, blocks.starts],
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((B, 1, D), jnp.float32),
            jax.ShapeDtypeStruct((B, blocks.grid[2], 1, D), jnp.float32),
        ),
        scratch_shapes=blocks.scratch(3),
        compiler_params=_PARAMS,
        cost_estimate=_cost(decay, x, arrays=3, flops=2),
    )(decay, x, initial_state)


def _backward_call(chunk, decay, x, starts, dh, d_final_state):
    """(d_decay, dx [B,T,D], d_initial_state [B,1,D])."""
    B, T, D = x.shape
    blocks = _blocks(chunk, decay, x, reverse=True)
    return platforms.pallas_call(
        partial(_backward_kernel, chunk, T),
        name="linear_scan_backward",
        grid=blocks.grid,
        in_specs=[blocks.sequence, blocks.sequence, blocks.starts, blocks.sequence, blocks.state],
        out_specs=[blocks.sequence, blocks.sequence, blocks.state],
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, decay.dtype),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((B, 1, D), jnp.float32),
        ),
        scratch_shapes=blocks.scratch(6),
        compiler_params=_PARAMS,
        cost_estimate=_cost(decay, x, arrays=5, flops=6),
    )(decay, x, starts, dh, d_final_state)


def _cost(decay, x, arrays, flops) -> pl.CostEstimate:
    """``arrays`` the size of x are moved, half of them in decay's dtype; XLA's own estimates take it from here."""
    moved = arrays * x.size * (decay.dtype.itemsize + x.dtype.itemsize) // 2
    return pl.CostEstimate(flops=flops * x.size, bytes_accessed=moved, transcendentals=0)


def _forward_kernel(chunk, T, decay_ref, x_ref, initial_ref, h_ref, final_ref, starts_ref, state, decay, x, out):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        state[...] = initial_ref[0]

    starts_ref[0, 0] = state[...]

    def map_of(token):
        rows = chunk.rows(token)
        return decay[rows, :], x[rows, :]

    def write(token, h):
        rows = chunk.rows(token)
        out[rows, :] = h = decay[rows, :] * h + x[rows, :]
        return h

    def column(lanes):
        _spread(chunk, decay_ref.at[0, :, lanes], decay)
        _spread(chunk, x_ref.at[0, :, lanes], x)
        _end(chunk, T, n, (decay, 1), (x, 0))
        runs, state[:, lanes] = _run_starts(chunk, map_of, state[:, lanes], reverse=False)
        _each_token(chunk, write, runs, reverse=False)
        _gather(chunk, out, h_ref.at[0, :, lanes])

    _each_column(state, column)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        final_ref[0] = state[...]


def _backward_kernel(
    chunk, T, decay_ref, x_ref, starts_ref, dh_ref, d_final_ref, d_decay_ref, dx_ref, d_initial_ref, d_state, decay, x, dh, before, e, da
):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        d_state[...] = d_final_ref[0]

    def map_of(token):
        rows = chunk.rows(token)
        return decay[rows, :], x[rows, :]

    def keep_previous(token, h):
        rows = chunk.rows(token)
        before[rows, :] = h
        return decay[rows, :] * h + x[rows, :]

    def map_back(token):
        rows = chunk.rows(token)
        a = decay[rows, :]
        return a, a * dh[rows, :]

    def write(token, u):
        rows = chunk.rows(token)
        e_t = dh[rows, :] + u
        e[rows, :] = e_t
        da[rows, :] = e_t * before[rows, :]
        return decay[rows, :] * e_t

    def column(lanes):
        _spread(chunk, decay_ref.at[0, :, lanes], decay)
        _spread(chunk, x_ref.at[0, :, lanes], x)
        _spread(chunk, dh_ref.at[0, :, lanes], dh)
        _end(chunk, T, pl.num_programs(2) - 1 - n, (decay, 1), (x, 0), (dh, 0))
        runs, _ = _run_starts(chunk, map_of, starts_ref[0, 0, :, lanes], reverse=False)
        _each_token(chunk, keep_previous, runs, reverse=False)
        runs, d_state[:, lanes] = _run_starts(chunk, map_back, d_state[:, lanes], reverse=True)
        _each_token(chunk, write, runs, reverse=True)
        _gather(chunk, da, d_decay_ref.at[0, :, lanes])
        _gather(chunk, e, dx_ref.at[0, :, lanes])

    _each_column(d_state, column)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        d_initial_ref[0] = d_state[...]


def _each_column(state, body):
    """body(lanes) for the columns of 128 channels of a block, whose ``state`` is [1,W]."""
    width = min(state.shape[1], LANES)

    @pl.loop(0, state.shape[1] // width)
    def _(column):
        body(pl.ds(pl.multiple_of(column * width, width), width))


def _spread(chunk, block, out):
    """Copy a block [8 span,W] into scratch, each row of runs ``chunk.pitch`` after the one before."""
    for row in range(ROWS):
        tokens = block[row * chunk.span : (row + 1) * chunk.span, :]
        out[row * chunk.pitch : row * chunk.pitch + chunk.span, :] = tokens.astype(out.dtype)


def _gather(chunk, scratch, block):
    """The inverse of :func:`_spread`."""
    for row in range(ROWS):
        tokens = scratch[row * chunk.pitch : row * chunk.pitch + chunk.span, :]
        block[row * chunk.span : (row + 1) * chunk.span, :] = tokens.astype(block.dtype)


def _end(chunk, T, n, *fillings):
    """(scratch, value): fill the tokens of chunk ``n`` that lie beyond T, if it is the last."""
    tokens = T % chunk.tokens
    if tokens:

        @pl.when(n == T // chunk.tokens)
        def _():
            for row in range(tokens // chunk.span, ROWS):
                begin, end = row * chunk.pitch + max(0, tokens - row * chunk.span), row * chunk.pitch + chunk.span
                for scratch, value in fillings:
                    scratch[begin:end, :] = jnp.full((end - begin, scratch.shape[1]), value, scratch.dtype)


def _each_token(chunk, body, carries, reverse):
    """carry = body(token, carry) through the tokens of each of G runs, side by side; ``token`` counts within a row of runs."""

    def step(i, carries):
        at = chunk.steps - 1 - i if reverse else i
        return tuple(body(g * chunk.steps + at, carry) for g, carry in enumerate(carries))

    return jax.lax.fori_loop(0, chunk.steps, step, tuple(carries), unroll=UNROLL)


def _run_starts(chunk, map_of, state, reverse):
    """The state [8,W] that each of G runs starts from, and the state [1,W] after all, given the state [1,W] before.

    map_of: token -> (p, r) [8,W], what the token does to a state: s -> p s + r.
    """

    def compose(token, run):
        p, r = map_of(token)
        return p * run[0], p * run[1] + r

    identity = jnp.ones((ROWS, state.shape[1]), jnp.float32), jnp.zeros((ROWS, state.shape[1]), jnp.float32)
    runs = _each_token(chunk, compose, (identity,) * chunk.groups, reverse)
    runs = runs[::-1] if reverse else runs

    # What all runs of a row do, then all runs of this row and those before it, in log2(8) steps.
    P, R = identity
    for p, r in runs:
        P, R = p * P, p * R + r
    row = jax.lax.broadcasted_iota(jnp.int32, P.shape, 0)
    row = ROWS - 1 - row if reverse else row
    for distance in (1, 2, 4):
        shift = ROWS - distance if reverse else distance
        p = jnp.where(row >= distance, pltpu.roll(P, shift, 0), 1)
        r = jnp.where(row >= distance, pltpu.roll(R, shift, 0), 0)
        P, R = P * p, P * r + R
    after = P * state + R
    before = jnp.where(row == 0, state, pltpu.roll(after, ROWS - 1 if reverse else 1, 0))

    starts = []
    for p, r in runs:
        starts.append(before)
        before = p * before + r
    return starts[::-1] if reverse else starts, after[:1] if reverse else after[ROWS - 1 :]
