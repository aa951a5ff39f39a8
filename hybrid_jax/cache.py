"""What a model remembers of a batch of texts: recurrent states and keys and values side by side.

A recurrent layer keeps its state and its convolutions' last inputs, of one size whatever the length; a full-attention layer
keeps keys and values, as many as the cache has room for, or as its window. Each row has its own length; padding is never kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax.mixers import KeysValues, Memory


class Cache(NamedTuple):
    """lengths: [B] int32, the tokens remembered of each row. stages: of each stage each run's Memory, leaves [repeats,run,B,...]."""

    lengths: jax.Array
    stages: list[list[Memory]]


def empty(kept_of_one: list[list[Memory]], batch: int, slots: int) -> Cache:
    """A cache of ``batch`` rows that holds nothing yet, its rings of ``slots``; kept_of_one: what the mixers return of one token a row.

    That has the shapes of all that a layer keeps, but for keys and values, which are one of many.
    """

    def zeros(memory: Memory) -> Memory:
        if isinstance(memory.state, KeysValues):
            state = KeysValues(*(jnp.zeros((*a.shape[:3], slots, *a.shape[4:]), a.dtype) for a in memory.state))
            return Memory(state, ())
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), memory)

    return Cache(jnp.zeros(batch, jnp.int32), [[zeros(memory) for memory in stage] for stage in kept_of_one])


def take(cache: Cache, memories: list[list[Memory]], real: jax.Array) -> Cache:
    """The cache after tokens of which the mixers returned ``memories``; real: [B,T] bool, False at padding."""
    going_on = jnp.any(real, axis=1)

    def one(old: Memory, new: Memory) -> Memory:
        if isinstance(old.state, KeysValues):
            return Memory(_write(old.state, new.state, cache.lengths, real), ())
        if real.shape[1] > 1:  # the operators have seen the padding
            return new
        return jax.tree.map(lambda a, b: jnp.where(going_on.reshape(-1, *[1] * (a.ndim - 3)), b.astype(a.dtype), a), old, new)

    stages = [[one(*pair) for pair in zip(*runs, strict=True)] for runs in zip(cache.stages, memories, strict=True)]
    return Cache(cache.lengths + jnp.sum(real, axis=1, dtype=jnp.int32), stages)


def _write(rings: KeysValues, new: KeysValues, lengths: jax.Array, real: jax.Array) -> KeysValues:
    """Rings [repeats,run,B,S,HK,K] with the real tokens of ``new`` [repeats,run,B,T,HK,K] each in its place."""
    slots = rings.k.shape[3]
    place = lengths[:, None] + jnp.cumsum(real, axis=1) - 1
    last = lengths + jnp.sum(real, axis=1)
    kept = real & (place >= last[:, None] - slots)  # of tokens that share a slot the last
    slot = jnp.where(kept, place % slots, slots)  # beyond the ring: dropped
    rows = jnp.arange(len(lengths))[:, None]
    return jax.tree.map(lambda ring, a: ring.at[:, :, rows, slot].set(a.astype(ring.dtype), mode="drop"), rings, new)


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with rings of ``slots``, more than it has. None may have gone round yet, as its tokens stay where they are."""

    def one(memory: Memory) -> Memory:
        if not isinstance(memory.state, KeysValues):
            return memory
        room = [(0, 0)] * 3 + [(0, slots - memory.state.k.shape[3])] + [(0, 0)] * 2
        return Memory(jax.tree.map(lambda a: jnp.pad(a, room), memory.state), ())

    return cache._replace(stages=[[one(memory) for memory in stage] for stage in cache.stages])
