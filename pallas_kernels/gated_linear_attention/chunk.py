"""One or more chunks of gated linear attention side by side, given how their states are combined.

A chunk of C tokens maps the state before it to the state after it, S' = diag(total) S + increment, and reads

    o = scale * (scores v + (q * since_start) S)        increment = (k * until_end)^T v        total = since_start_C
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_linear_attention import decays

# (totals [B,H,G,K|1], increments [B,H,G,K,V], state [B,H,K,V]) -> the states [B,H,G,K,V] before each chunk and [B,H,K,V] after the last.
Combine = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Span(NamedTuple):
    """Which document tokens [B,G C] belong to (as :class:`pallas_kernels.segments.Segments`) and, before each chunk, the state [B,G]."""

    index: jax.Array
    real: jax.Array
    before: jax.Array


def forward(inputs, state: jax.Array, span: Span | None, *, scale: float, length: int, combine: Combine):
    """inputs (q, k, v, log_decay) of G chunks of C = ``length`` tokens, state [B,HV,K,V] -> (o [B,G C,HV,V], the state after)."""
    v_dtype = inputs[2].dtype
    inputs = tuple(x.astype(state.dtype) for x in inputs)
    if span is not None:
        inputs = tuple(x if x.ndim == 1 else _select_real(x, span.real) for x in inputs)
    q, k, v, log_decay = (_chunked(x, length) for x in inputs)
    group = v.shape[1] // q.shape[1]
    q, k = jnp.repeat(q, group, axis=1), jnp.repeat(k, group, axis=1)

    per_channel = log_decay.ndim == q.ndim
    scores, since_start, until_end = (decays.per_channel if per_channel else decays.per_head)(q, k, log_decay)
    total = _last(since_start) if per_channel else since_start[..., -1, :]
    if span is not None:
        index = span.index.reshape(span.index.shape[0], 1, -1, length)
        before, last = span.before[:, None, :, None], index[..., -1:]
        scores = jnp.where(index[..., :, None] == index[..., None, :], scores, 0)
        since_start = jnp.where((index == before)[..., None], since_start, 0)
        until_end = jnp.where((index == last)[..., None], until_end, 0)
        total = jnp.where(before == last, total, 0)

    increments = jnp.einsum("...ck,...cv->...kv", weighted(until_end, k), v)
    states, state = combine(total, increments, state)
    o = jnp.einsum("...ij,...jv->...iv", scores, v) + jnp.einsum("...ik,...kv->...iv", weighted(since_start, q), states)
    o = jnp.moveaxis(scale * o, 1, 3)
    o = o.reshape(o.shape[0], -1, *o.shape[3:])
    return (o if span is None else _select_real(o, span.real)).astype(v_dtype), state


def one(total, increments, state):
    """The states before and after a single chunk."""
    return state[:, :, None], decayed(total[:, :, 0], state) + increments[:, :, 0]


def decayed(total: jax.Array, state: jax.Array) -> jax.Array:
    """diag(total) S for total [...,K|1] and S [...,K,V]."""
    if total.shape[-1] == 1:
        return jnp.einsum("...,...kv->...kv", total[..., 0], state)
    return weighted(total[..., None], state)


def weighted(weights: jax.Array, x: jax.Array) -> jax.Array:
    """weights [...,C,1] or [...,C,K] times x [...,C,K]."""
    if weights.shape[-1] == 1:
        # As an einsum, since then the derivative by the weights is one too: XLA's reduction of a product is several times slower on a CPU.
        return jnp.einsum("...c,...ck->...ck", weights[..., 0], x)
    return weights * x


def _last(x):
    """x[...,-1,:], as a product: of a slice, XLA would compute the decays anew for every element of the state that they meet."""
    C = x.shape[-2]
    row = jnp.broadcast_to(np.arange(C) == C - 1, x.shape[:-1]).astype(x.dtype)
    return jnp.einsum("...t,...tk->...k", row, x, precision=jax.lax.Precision.HIGHEST)


def _chunked(x, length):
    """[B,G C,H,...] -> [B,H,G,C,...]; a fixed decay [H] -> [1,H,1,1]."""
    if x.ndim == 1:
        return x[None, :, None, None]
    return jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), 3, 1)


def _select_real(x, real):
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)
