"""The convolution of whole rows and its gradient, which keeps its inputs only, whatever runs the two passes.

Padding between a document's tokens is the one thing that a shift cannot express. Where the ids (data, not shapes) hold
such padding, the row's real tokens are first moved together and the outputs moved back; elsewhere, which is nearly always,
nothing is moved.
"""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.segments import Segments


class Passes(NamedTuple):
    """What runs the convolution of tokens that stand together, documents in a row: index [B,T] int32 counts them from 0, or None for one.

    Where it is -1 there is padding: whatever x and dy hold there, y and dx are 0, and nothing else comes of it.
    forward: (activation, x [B,T,D], weight [D,W], state [B,W-1,D], index) -> y [B,T,D] in x's dtype.
    backward: (activation, x, weight, state, index, dy [B,T,D]) -> (dx [B,T,D] in x's dtype, dweight [D,W], dstate [B,W-1,D]).
    weight and state come, and their gradients go, in float32, or float64 where x is float64. The state belongs to document 0.
    """

    forward: Callable[..., jax.Array]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class Packing(NamedTuple):
    """Where a row's real tokens stand when moved together at its front.

    order: [B,T] int32, the row's position that comes t-th: real tokens in their order, then padding.
    place: [B,T] int32, its inverse: the place that position t goes to.
    needed: [] bool, whether any document has padding inside, which its taps have to pass over.
    """

    order: jax.Array
    place: jax.Array
    needed: jax.Array


def causal_conv(passes: Passes, x, weight, activation, initial_state, segments: Segments | None):
    """[B,T,D] and the final state by ``passes``; see api.py."""
    B, _, D = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    weight = weight.astype(dtype)
    state = jnp.zeros((B, weight.shape[1] - 1, D), dtype) if initial_state is None else initial_state.astype(dtype)
    if segments is None:
        return _convolve(passes, activation, x, weight, state, None, None), _last_inputs(x, state)
    packing = _pack(segments, initial_state is not None)
    y = _convolve(passes, activation, x, weight, state, jnp.where(segments.real, segments.index, -1), packing)
    return y, _last_real_inputs(x, state, segments, packing)


def _pack(segments: Segments, has_state: bool) -> Packing:
    index, real = segments
    seen = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    padding_seen = jnp.cumsum(~real, axis=1, dtype=jnp.int32)
    place = jnp.where(real, seen - 1, seen[:, -1:] + padding_seen - 1)
    order = jnp.argsort(place, axis=1).astype(jnp.int32)
    # A gap is a real token whose neighbour is padding of the same document, with something before for the taps to reach.
    reaches = real[:, 1:] & ~real[:, :-1] & (index[:, 1:] == index[:, :-1])
    return Packing(order, place, jnp.any(reaches if has_state else reaches & (seen[:, :-1] > 0)))


def _move(x, positions):
    """Position t of the result is position ``positions[t]`` of ``x``, row by row; [B,T] or [B,T,D]."""
    return jax.vmap(lambda row, at: row[at])(x, positions)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(passes, activation, x, weight, state, index, packing):
    """[B,T,D] outputs in x's dtype. index None: one document a row. packing None: no padding inside documents."""
    if packing is None:
        return passes.forward(activation, x, weight, state, index)

    def packed():
        y = passes.forward(activation, _move(x, packing.order), weight, state, _move(index, packing.order))
        return _move(y, packing.place)

    return jax.lax.cond(packing.needed, packed, lambda: passes.forward(activation, x, weight, state, index))


def _convolve_forward(passes, activation, x, weight, state, index, packing):
    return _convolve(passes, activation, x, weight, state, index, packing), (x, weight, state, index, packing)


def _convolve_backward(passes, activation, residuals, dy):
    x, weight, state, index, packing = residuals
    if packing is None:
        return *passes.backward(activation, x, weight, state, index, dy), None, None

    def packed():
        moved = (_move(a, packing.order) for a in (x, index, dy))
        x_, index_, dy_ = moved
        dx, dweight, dstate = passes.backward(activation, x_, weight, state, index_, dy_)
        return _move(dx, packing.place), dweight, dstate

    gradients = jax.lax.cond(packing.needed, packed, lambda: passes.backward(activation, x, weight, state, index, dy))
    return *gradients, None, None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _last_inputs(x, state):
    """The last W-1 of [state, x]."""
    T, kept = x.shape[1], state.shape[1]
    return jnp.concatenate([state, x[:, max(T - kept, 0) :].astype(state.dtype)], axis=1)[:, min(T, kept) :]


def _last_real_inputs(x, state, segments: Segments, packing: Packing):
    """The last W-1 of [state, the real tokens], zero where they are not of the last document."""
    kept = state.shape[1]
    if kept == 0:
        return state
    count = jnp.sum(segments.real, axis=1, dtype=jnp.int32)
    at = count[:, None] + jnp.arange(kept)  # [B,W-1] in [state, the real tokens moved together]
    position = _move(packing.order, jnp.maximum(at - kept, 0))
    of_state = at < kept
    inputs = jnp.where(of_state[:, :, None], _move(state, jnp.minimum(at, kept - 1)), _move(x, position).astype(state.dtype))
    document = jnp.where(of_state, 0, _move(segments.index, position))
    return jnp.where((document == segments.index[:, -1:])[:, :, None], inputs, 0)
