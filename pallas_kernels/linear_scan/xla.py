"""h_t = a_t * h_{t-1} + x_t without a state of its own for every token, in the order that suits the platform.

A CPU runs the tokens one after another, reading and writing the arrays in place: the recurrence does two FLOPs for every
twelve bytes, so that loop is as fast as memory, and any blocked order only moves more bytes. An accelerator cannot afford T
small steps, so there T tokens are N blocks of C, side by side: a first pass over the C positions of all blocks at once gives
what each block does to a state, h -> P h + r; a scan over the N blocks gives the state each begins with; a second pass over
the positions writes h. That is C + N + C wide steps. Nothing is ever divided by a decay, so a decay of 0 is as exact as any.
"""
import math

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.linear_scan.vjp import solve


def linear_scan(decay: jax.Array, x: jax.Array, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """decay, x [B,T,D] and initial_state [B,D] of one dtype -> (h [B,T,D], final state [B,D])."""
    h = solve(_run, decay, x, initial_state)
    return h, h[:, -1]


def _run(decay, x, initial_state, reverse):
    return platforms.by_platform(
        decay,
        x,
        initial_state,
        cpu=lambda *arrays: one_by_one(*arrays, reverse),
        default=lambda *arrays: side_by_side(*arrays, reverse),
    )


def one_by_one(decay: jax.Array, x: jax.Array, initial_state: jax.Array, reverse: bool) -> jax.Array:
    """h [B,T,D], token after token (from the last where ``reverse``)."""
    # Rows are taken by index: arrays given to scan as its inputs are copied first, which costs more than the recurrence.
    return _scan_axis(decay, x, initial_state, 1, reverse)


def side_by_side(decay: jax.Array, x: jax.Array, initial_state: jax.Array, reverse: bool) -> jax.Array:
    """h [B,T,D], with the blocks of the time axis side by side."""
    B, T, D = x.shape
    C = block_length(T)
    N = -(-T // C)
    # Padded tokens keep the state they are given, at the end of the row or, in reverse, before anything has happened.
    padding = [(0, 0), (0, N * C - T), (0, 0)]
    decay = jnp.pad(decay, padding, constant_values=1).reshape(B, N, C, D)
    x = jnp.pad(x, padding).reshape(B, N, C, D)

    def position(block, c):
        product, h = block
        a = _row(decay, c, 2)
        return (a * product, a * h + _row(x, c, 2)), None

    keep = jnp.ones_like(x[:, :, 0]), jnp.zeros_like(x[:, :, 0])
    (product, h), _ = jax.lax.scan(position, keep, jnp.arange(C), reverse=reverse)

    def block(state, n):
        return _row(product, n, 1) * state + _row(h, n, 1), state

    _, starts = jax.lax.scan(block, initial_state, jnp.arange(N), reverse=reverse)
    return _scan_axis(decay, x, jnp.moveaxis(starts, 0, 1), 2, reverse).reshape(B, N * C, D)[:, :T]


def _scan_axis(decay, x, state, axis, reverse):
    def step(h, t):
        h = _row(decay, t, axis) * h + _row(x, t, axis)
        return h, h

    _, h = jax.lax.scan(step, state, jnp.arange(x.shape[axis]), reverse=reverse)
    return jnp.moveaxis(h, 0, axis)


def _row(x, index, axis):
    return jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)


def block_length(T: int) -> int:
    """About sqrt(T / 2), which makes C + N + C least, as a power of two."""
    return 1 << max(0, round(math.log2(T / 2) / 2)) if T > 1 else 1
