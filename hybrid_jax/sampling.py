"""Choosing the next token from its logits."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How a token is drawn; numbers, or arrays inside a compiled function. None leaves a filter out.

    temperature: what logits are divided by; None: greedy, the likeliest token (of equals the lowest id).
    top_k, top_p, min_p: applied in this order to the tempered distribution, likeliest token first, of equals the lowest id:
        the first k tokens; of these, renormalised, the fewest whose probabilities reach top_p; of these, those at least min_p
        times as likely as the likeliest.
    """

    temperature: float | jax.Array | None = None
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None
    min_p: float | jax.Array | None = None


def sampling(temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None) -> Sampling:
    """The Sampling of these settings, temperature 0 being greedy. Raises ValueError for one out of range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, needs a number of at least 0 (0: always the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, needs to be at least 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, needs to be above 0 and at most 1, or None for no limit")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}, needs to be from 0 to 1, or None for no limit")
    if temperature == 0:  # every filter keeps the likeliest token
        return Sampling()
    return Sampling(float(temperature), top_k, None if top_p == 1 else top_p, min_p)


def sample(logits: jax.Array, keys: jax.Array, settings: Sampling) -> jax.Array:
    """A token a row: logits [B,V] float32 and keys [B] -> [B] int32. A row's draw depends on its own logits and key alone."""
    if settings.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / settings.temperature
    if settings[1:] == (None, None, None):
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
    logits = _filtered(jnp.take_along_axis(logits, order, axis=-1), settings)
    chosen = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _filtered(logits: jax.Array, settings: Sampling) -> jax.Array:
    """[B,V] logits, highest first, with -inf for tokens that are left out."""
    if settings.top_k is not None:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < settings.top_k, logits, -jnp.inf)
    if settings.top_p is not None:
        likelier = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)[:, :-1]  # the probability of all tokens before one
        logits = logits.at[:, 1:].set(jnp.where(likelier < settings.top_p, logits[:, 1:], -jnp.inf))
    if settings.min_p is not None:
        logits = jnp.where(logits - logits[:, :1] >= jnp.log(settings.min_p), logits, -jnp.inf)
    return logits
