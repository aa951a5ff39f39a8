"""h_t = a_t * h_{t-1} + x_t as a Mosaic TPU kernel that reads and writes each element once, forward and backward.

The grid is (B, blocks of 128 channels, chunks of T); chunks run in order, the state between them in VMEM. A chunk is 8 G runs
of consecutive tokens, and a vector register holds one token of each of 8 runs, so that the recurrence takes steps of 8 tokens
in G independent chains. As a run's first state is not known yet, there are two passes over a chunk in VMEM: the first finds
what each run does to a state, h -> P h + r; combining those gives the state each run begins with; the second writes h.

The backward pass recomputes the states of a chunk from the state before it, which forward keeps, and runs the recurrence of
the gradients in the other direction, with u_t = a_{t+1} e_{t+1} between the tokens:

    e_t = dh_t + u_t    dx_t = e_t    da_t = e_t h_{t-1}    u_{t-1} = a_t e_t

So it reads a, x and dh and writes da and dx, once. Documents and padding are a code a token, applied as a and x are loaded.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms
from pallas_kernels.segments import Segments

ROWS = 8  # sublanes of a vector register
LANES = 128  # and its lanes
CONTINUES, STARTS, PADDING = range(3)  # what a token's code says of it
DTYPES = (jnp.float32, jnp.bfloat16)


class Chunk(NamedTuple):
    """span: consecutive tokens a row of vector registers goes through, a multiple of 128; groups: G, the runs they are cut into."""

    span: int
    groups: int

    @property
    def tokens(self) -> int:
        return ROWS * self.span

    @property
    def steps(self) -> int:
        return self.span // self.groups


# The chunk for each TPU generation. DEFAULT is within the VMEM of all.
DEFAULT = Chunk(span=128, groups=8)
TUNED: dict[str, Chunk] = {}


def is_faster(decay: jax.Array, x: jax.Array) -> bool:
    """Whether this kernel is the fastest measured implementation on TPU for such arrays."""
    return x.dtype in DTYPES and decay.dtype in DTYPES


def linear_scan(decay: jax.Array, x: jax.Array, initial_state: jax.Array, segments: Segments | None) -> tuple[jax.Array, jax.Array]:
    """decay, x [B,T,D] in float32 or bfloat16, initial_state [B,D] -> (h [B,T,D] in x's dtype, the final state [B,D] in float32).

    Raises ValueError for other dtypes.
    """
    for name, array in (("decay", decay), ("x", x)):
        if array.dtype not in DTYPES:
            raise ValueError(f"linear_scan: {name} has dtype {array.dtype}, needs float32 or bfloat16 for implementation='pallas'")
    chunk = TUNED.get(platforms.generation(), DEFAULT)
    h, final_state = _scan(chunk, decay, x, initial_state.astype(jnp.float32)[:, None], _codes(chunk, x, segments))
    return h, final_state[:, 0]


def _codes(chunk: Chunk, x: jax.Array, segments: Segments | None) -> jax.Array:
    """[B,N,8,span] int32: the code of each token of each chunk; what lies beyond T is padding."""
    B, T, _ = x.shape
    if segments is None:
        codes = jnp.full((B, T), CONTINUES, jnp.int32)
    else:
        codes = jnp.where(segments.real, jnp.where(segments.starts, STARTS, CONTINUES), PADDING).astype(jnp.int32)
    codes = jnp.pad(codes, [(0, 0), (0, -T % chunk.tokens)], constant_values=PADDING)
    return codes.reshape(B, -1, ROWS, chunk.span)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, decay, x, initial_state, codes):
    """initial and final state are [B,1,D]."""
    h, final_state, _ = _forward_call(chunk, decay, x, initial_state, codes)
    return h, final_state


def _scan_forward(chunk, decay, x, initial_state, codes):
    h, final_state, starts = _forward_call(chunk, decay, x, initial_state, codes)
    return (h, final_state), (decay, x, codes, starts)


def _scan_backward(chunk, residuals, cotangents):
    d_decay, dx, d_initial_state = _backward_call(chunk, *residuals, *cotangents)
    return d_decay, dx, d_initial_state, None


_scan.defvjp(_scan_forward, _scan_backward)


class _Blocks(NamedTuple):
    """The grid, and the block of each kind of array that a step of it works on; where ``reverse``, the last chunk comes first."""

    grid: tuple[int, int, int]
    sequence: pl.BlockSpec  # [B,T,D]
    codes: pl.BlockSpec  # [B,N,8,span]
    state: pl.BlockSpec  # [B,1,D]
    starts: pl.BlockSpec  # [B,N,1,D], the state before each chunk
    width: int


def _blocks(chunk: Chunk, x: jax.Array, reverse: bool) -> _Blocks:
    B, T, D = x.shape
    N, width = pl.cdiv(T, chunk.tokens), min(D, LANES)

    def at(n):
        return N - 1 - n if reverse else n

    return _Blocks(
        (B, pl.cdiv(D, width), N),
        pl.BlockSpec((1, chunk.tokens, width), lambda b, d, n: (b, at(n), d)),
        pl.BlockSpec((1, 1, ROWS, chunk.span), lambda b, d, n: (b, at(n), 0, 0)),
        pl.BlockSpec((1, 1, width), lambda b, d, n: (b, 0, d)),
        pl.BlockSpec((1, 1, 1, width), lambda b, d, n: (b, at(n), 0, d)),
        width,
    )


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _forward_call(chunk, decay, x, initial_state, codes):
    """(h [B,T,D], final state [B,1,D], the states before each chunk [B,N,1,D])."""
    B, T, D = x.shape
    blocks = _blocks(chunk, x, reverse=False)
    rows = pltpu.VMEM((chunk.tokens, blocks.width), jnp.float32)
    return platforms.pallas_call(
        partial(_forward_kernel, chunk),
        name="linear_scan_forward",
        grid=blocks.grid,
        in_specs=[blocks.sequence, blocks.sequence, blocks.state, blocks.codes],
        out_specs=[blocks.sequence, blocks.state, blocks.starts],
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((B, 1, D), jnp.float32),
            jax.ShapeDtypeStruct((B, blocks.grid[2], 1, D), jnp.float32),
        ),
        scratch_shapes=[pltpu.VMEM((1, blocks.width), jnp.float32), rows, rows],
        compiler_params=_PARAMS,
        cost_estimate=_cost(decay, x, arrays=3, flops=2),
    )(decay, x, initial_state, codes)


def _backward_call(chunk, decay, x, codes, starts, dh, d_final_state):
    """(d_decay, dx [B,T,D], d_initial_state [B,1,D])."""
    B, T, D = x.shape
    blocks = _blocks(chunk, x, reverse=True)
    rows = pltpu.VMEM((chunk.tokens, blocks.width), jnp.float32)
    return platforms.pallas_call(
        partial(_backward_kernel, chunk),
        name="linear_scan_backward",
        grid=blocks.grid,
        in_specs=[blocks.sequence, blocks.sequence, blocks.codes, blocks.starts, blocks.sequence, blocks.state],
        out_specs=[blocks.sequence, blocks.sequence, blocks.state],
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, decay.dtype),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((B, 1, D), jnp.float32),
        ),
        scratch_shapes=[pltpu.VMEM((1, blocks.width), jnp.float32), rows, rows, rows],
        compiler_params=_PARAMS,
        cost_estimate=_cost(decay, x, arrays=5, flops=6),
    )(decay, x, codes, starts, dh, d_final_state)


def _cost(decay, x, arrays, flops) -> pl.CostEstimate:
    """``arrays`` the size of x are moved, half of them in decay's dtype; XLA's own estimates take it from here."""
    moved = arrays * x.size * (decay.dtype.itemsize + x.dtype.itemsize) // 2
    return pl.CostEstimate(flops=flops * x.size, bytes_accessed=moved, transcendentals=0)


def _forward_kernel(chunk, decay_ref, x_ref, initial_ref, codes_ref, h_ref, final_ref, starts_ref, state, decay, x):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        state[...] = initial_ref[0]

    starts_ref[0, 0] = state[...]
    decay[...] = decay_ref[0].astype(jnp.float32)
    x[...] = x_ref[0].astype(jnp.float32)
    load = partial(_load, chunk, codes_ref[0, 0], decay, x)

    def write(token, h):
        rows, a, x_t, code = load(token)
        h = a * h + x_t
        x[rows, :] = jnp.where(code == PADDING, 0, h)
        return h

    runs, state[...] = _run_starts(chunk, lambda token: load(token)[1:3], state[...], reverse=False)
    _each_token(chunk, write, runs, reverse=False)
    h_ref[0] = x[...].astype(h_ref.dtype)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        final_ref[0] = state[...]


def _backward_kernel(
    chunk, decay_ref, x_ref, codes_ref, starts_ref, dh_ref, d_final_ref, d_decay_ref, dx_ref, d_initial_ref, d_state, decay, x, dh
):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        d_state[...] = d_final_ref[0]

    decay[...] = decay_ref[0].astype(jnp.float32)
    x[...] = x_ref[0].astype(jnp.float32)
    dh[...] = dh_ref[0].astype(jnp.float32)
    load_x = partial(_load, chunk, codes_ref[0, 0], decay, x)
    load_dh = partial(_load, chunk, codes_ref[0, 0], decay, dh)

    def keep_previous(token, h):
        rows, a, x_t, _ = load_x(token)
        x[rows, :] = h
        return a * h + x_t

    runs, _ = _run_starts(chunk, lambda token: load_x(token)[1:3], starts_ref[0, 0], reverse=False)
    _each_token(chunk, keep_previous, runs, reverse=False)

    def map_of(token):
        _, a, dh_t, _ = load_dh(token)
        return a, a * dh_t

    def write(token, u):
        rows, a, dh_t, code = load_dh(token)
        e = dh_t + u
        dh[rows, :] = jnp.where(code == PADDING, 0, e)
        x[rows, :] = jnp.where(code == CONTINUES, e * x[rows, :], 0)  # no other token's decay is the caller's
        return a * e

    runs, d_state[...] = _run_starts(chunk, map_of, d_state[...], reverse=True)
    _each_token(chunk, write, runs, reverse=True)
    d_decay_ref[0] = x[...].astype(d_decay_ref.dtype)
    dx_ref[0] = dh[...].astype(dx_ref.dtype)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        d_initial_ref[0] = d_state[...]


def _load(chunk, codes, decay, x, token):
    """Of the 8 tokens that are ``token`` within their rows: their place in a chunk, decay, input and code.

    A start forgets the state (decay 0); padding keeps it (decay 1) and adds nothing (input 0).
    """
    rows = pl.ds(token, ROWS, stride=chunk.span)
    a, x = decay[rows, :], x[rows, :]
    code = jnp.broadcast_to(pltpu.roll(codes, (chunk.span - token) % chunk.span, 1)[:, :1], a.shape)
    a = jnp.where(code == CONTINUES, a, jnp.where(code == PADDING, 1.0, 0.0))
    return rows, a, jnp.where(code == PADDING, 0.0, x), code


def _each_token(chunk, body, carries, reverse):
    """carry = body(token, carry) through the tokens of each of G runs, side by side; ``token`` counts within a row of runs."""

    def step(i, carries):
        at = chunk.steps - 1 - i if reverse else i
        return tuple(body(g * chunk.steps + at, carry) for g, carry in enumerate(carries))

    return jax.lax.fori_loop(0, chunk.steps, step, tuple(carries))


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
