"""A sequence dealt over devices, each holding a stretch of it: what a stretch must know of those before it.

Inside ``jax.shard_map``, with the devices along one axis of the mesh in the order of their stretches. To what a recurrence was before a
stretch S, the stretch does M S + N, and two in a row do (M2 M1) S + (M2 N1 + N2): so the devices pass on pairs (M, N), in log2 of
their number of rounds, each of the same few bytes however long the stretches are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (the transition and increment of a stretch, those of the next one) -> those of both together.
Then = Callable[[tuple[Any, Any], tuple[Any, Any]], tuple[Any, Any]]


def state_before(
    then: Then,
    transition: jax.Array,
    increment: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    axis_name: str,
) -> jax.Array:
    """The state that this device's stretch starts from, shaped as ``increment``: zeros where another document begins with it.

    transition, increment: of this device's stretch, [B,...]; segment_ids [B,T] of its tokens, or None; initial_state: before the first
    device's, zeros where None.
    """
    goes_on = _goes_on(segment_ids, axis_name)
    first = jnp.zeros_like(increment) if initial_state is None else initial_state.astype(increment.dtype)
    transition = _kept(transition, goes_on)
    # Each device takes the pair of the one before; the first one's is of what there was before, which no transition is asked of.
    pair = _shifted((transition, increment), 1, axis_name)
    at, devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    pair = pair[0], jnp.where(at == 0, first, pair[1])
    distance = 1
    while distance < devices:
        both = then(_shifted(pair, distance, axis_name), pair)
        pair = jax.tree.map(lambda far, near, reached=at >= distance: jnp.where(reached, far, near), both, pair)
        distance *= 2
    return _kept(pair[1], goes_on)


def _shifted(tree, distance: int, axis_name: str):
    """Of the device ``distance`` before; zeros where there is none."""
    pairs = [(i, i + distance) for i in range(jax.lax.axis_size(axis_name) - distance)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)


def last(x: jax.Array, axis_name: str) -> jax.Array:
    """``x`` of the last device, on all."""
    here = jax.lax.axis_index(axis_name) == jax.lax.axis_size(axis_name) - 1
    return jax.lax.psum(jnp.where(here, x, jnp.zeros_like(x)), axis_name)


def _goes_on(segment_ids: jax.Array | None, axis_name: str) -> jax.Array | None:
    """[B] bool: whether the document before this device's stretch is that of its first real token, or nothing but padding is on one side.

    segment_ids [B,T] of the stretch, 0 padding; None, and None is returned, where a row is one document.
    """
    if segment_ids is None:
        return None
    real = segment_ids != 0
    positions = jnp.arange(segment_ids.shape[1])

    def at(position):
        found = jnp.take_along_axis(segment_ids, position[:, None], axis=1)[:, 0]
        return jnp.where(jnp.any(real, axis=1), found, 0)

    first, final = at(jnp.argmax(real, axis=1)), at(jnp.argmax(jnp.where(real, positions, -1), axis=1))
    finals = jax.lax.all_gather(final, axis_name)  # [devices,B]
    devices = jnp.arange(len(finals))[:, None]
    spoken = jnp.where((finals != 0) & (devices < jax.lax.axis_index(axis_name)), devices, -1)  # those before with a real token
    before = jnp.where(jnp.any(spoken >= 0, axis=0), jnp.take_along_axis(finals, jnp.argmax(spoken, axis=0)[None], axis=0)[0], 0)
    return (first == 0) | (before == 0) | (first == before)


def _kept(state: jax.Array, goes_on: jax.Array | None) -> jax.Array:
    """``state`` [B,...] where its document goes on, zeros where another begins."""
    return state if goes_on is None else jnp.where(goes_on.reshape(-1, *[1] * (state.ndim - 1)), state, 0)
