"""The convolution as W shifted products, with a VJP that keeps its inputs only.

Padding between a document's tokens is the one thing that a shift cannot express. Where the ids (data, not shapes) hold
such padding, the row's real tokens are first moved together and the outputs moved back; elsewhere, which is nearly always,
nothing is moved. Autodiff would keep float32 pre-activations, and its backward pass was measured 10 times slower on CPU.
"""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.segments import Segments


class Packing(NamedTuple):
    """Where a row's real tokens stand when moved together at its front.

    order: [B,T] int32, the row's position that comes t-th: real tokens in their order, then padding.
    place: [B,T] int32, its inverse: the place that position t goes to.
    needed: [] bool, whether any document has padding inside, which its taps have to pass over.
    """

    order: jax.Array
    place: jax.Array
    needed: jax.Array


def causal_conv(x, weight, activation, initial_state, segments: Segments | None):
    """[B,T,D] by shifted products; see api.py."""
    B, _, D = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    weight = weight.astype(dtype)
    state = jnp.zeros((B, weight.shape[1] - 1, D), dtype) if initial_state is None else initial_state.astype(dtype)
    if segments is None:
        return _convolve(activation, x, weight, state, None, None), _last_inputs(x, state)
    real = segments.real[:, :, None]
    x = jnp.where(real, x, 0)  # what padding holds, nan included, ends here
    packing = _pack(segments, initial_state is not None)
    y = _convolve(activation, x, weight, state, segments.index, packing)
    return jnp.where(real, y, 0), _last_real_inputs(x, state, segments, packing)


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation, x, weight, state, index, packing):
    """[B,T,D] outputs in x's dtype. index None: one document a row. packing None: no padding inside documents."""
    if packing is None:
        return _shifted_forward(activation, x, weight, state, index)

    def packed():
        y = _shifted_forward(activation, _move(x, packing.order), weight, state, _move(index, packing.order))
        return _move(y, packing.place)

    return jax.lax.cond(packing.needed, packed, lambda: _shifted_forward(activation, x, weight, state, index))


def _convolve_forward(activation, x, weight, state, index, packing):
    return _convolve(activation, x, weight, state, index, packing), (x, weight, state, index, packing)


def _convolve_backward(activation, residuals, dy):
    x, weight, state, index, packing = residuals
    if packing is None:
        return *_shifted_backward(activation, x, weight, state, index, dy), None, None

    def packed():
        moved = (_move(a, packing.order) for a in (x, index, dy))
        x_, index_, dy_ = moved
        dx, dweight, dstate = _shifted_backward(activation, x_, weight, state, index_, dy_)
        return _move(dx, packing.place), dweight, dstate

    gradients = jax.lax.cond(packing.needed, packed, lambda: _shifted_backward(activation, x, weight, state, index, dy))
    return *gradients, None, None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _extend(x, state, index):
    """[state, x] as [B,W-1+T,D], and its documents [B,W-1+T] or None; the state belongs to document 0."""
    extended = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
    return extended, None if index is None else jnp.pad(index, [(0, 0), (state.shape[1], 0)])


def _taps(extended, document, weight):
    """The pre-activation sums [B,T,D] and their W inputs, each [B,T,D], zero where they belong to another document."""
    W = weight.shape[1]
    T = extended.shape[1] - (W - 1)
    taps = [extended[:, w : w + T] for w in range(W)]
    if document is not None:
        own = document[:, W - 1 :]
        taps = [jnp.where((document[:, w : w + T] == own)[:, :, None], tap, 0) for w, tap in enumerate(taps)]
    return sum(weight[:, w] * tap for w, tap in enumerate(taps)), taps


def _shifted_forward(activation, x, weight, state, index):
    sums, _ = _taps(*_extend(x, state, index), weight)
    return (jax.nn.silu(sums) if activation == "silu" else sums).astype(x.dtype)


def _shifted_backward(activation, x, weight, state, index, dy):
    T, W = x.shape[1], weight.shape[1]
    extended, document = _extend(x, state, index)
    # XLA's CPU backend computes the pre-activations anew for every sum over time unless a loop keeps them in cache.
    dsums, dweight = jax.lax.platform_dependent(
        extended,
        document,
        weight,
        dy.astype(state.dtype),
        cpu=partial(_sums_and_weight_backward, activation, min(T, 64)),
        default=partial(_sums_and_weight_backward, activation, T),
    )

    # Input s of [state, x] was read through tap w by token s - w. The margins belong to no token: their gradient is 0.
    margins = [(0, 0), (W - 1, W - 1)]
    dsums = jnp.pad(dsums, margins + [(0, 0)])
    readers = [slice(W - 1 - w, 2 * (W - 1) - w + T) for w in range(W)]
    terms = [weight[:, w] * dsums[:, reader] for w, reader in enumerate(readers)]
    if index is not None:
        own = jnp.pad(index, margins)
        terms = [jnp.where((own[:, reader] == document)[:, :, None], term, 0) for reader, term in zip(readers, terms, strict=True)]
    dextended = sum(terms)
    return dextended[:, W - 1 :].astype(x.dtype), dweight, dextended[:, : W - 1]


def _sums_and_weight_backward(activation, block, extended, document, weight, dy):
    """The gradients of the pre-activation sums [B,T,D] and of weight [D,W], ``block`` tokens at a time."""
    B, T, D = dy.shape
    W = weight.shape[1]
    end = [(0, 0), (0, -T % block)]
    extended, dy = jnp.pad(extended, end + [(0, 0)]), jnp.pad(dy, end + [(0, 0)])
    document = None if document is None else jnp.pad(document, end)

    def body(dweight, start):
        def cut(a, length):
            return None if a is None else jax.lax.dynamic_slice_in_dim(a, start, length, axis=1)

        sums, taps = _taps(cut(extended, block + W - 1), cut(document, block + W - 1), weight)
        dsums = cut(dy, block)
        if activation == "silu":
            gate = jax.nn.sigmoid(sums)
            dsums = dsums * gate * (1 + sums * (1 - gate))
        return dweight + jnp.stack([jnp.sum(tap * dsums, axis=(0, 1)) for tap in taps]), dsums

    dweight, dsums = jax.lax.scan(body, jnp.zeros((W, D), dy.dtype), jnp.arange(0, dy.shape[1], block))
    return dsums.swapaxes(0, 1).reshape(B, -1, D)[:, :T], dweight.T


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
