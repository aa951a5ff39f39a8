"""The convolution as W shifted products. Autodiff would keep float32 sums, and its backward pass was measured 10 times slower on CPU."""
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.causal_conv import vjp


def _real(x, index):
    """x [B,T,D] without what padding holds."""
    return x if index is None else jnp.where((index >= 0)[:, :, None], x, 0)


def _extend(x, state, index):
    """[state, x] as [B,W-1+T,D], and its documents [B,W-1+T] or None; the state belongs to document 0."""
    extended = jnp.concatenate([state, _real(x, index).astype(state.dtype)], axis=1)
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


def _forward(activation, x, weight, state, index):
    sums, _ = _taps(*_extend(x, state, index), weight)
    return (jax.nn.silu(sums) if activation == "silu" else sums).astype(x.dtype)


def _backward(activation, x, weight, state, index, dy):
    T, W = x.shape[1], weight.shape[1]
    extended, document = _extend(x, state, index)
    # XLA's CPU backend computes the pre-activations anew for every sum over time unless a loop keeps them in cache.
    dsums, dweight = platforms.by_platform(
        extended,
        document,
        weight,
        _real(dy, index).astype(state.dtype),
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


PASSES = vjp.Passes(_forward, _backward)
causal_conv = partial(vjp.causal_conv, PASSES)
