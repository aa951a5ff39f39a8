"""What a model remembers of a batch of texts: recurrent states and keys and values side by side.

A recurrent layer keeps its state and its convolutions' last inputs, of one size whatever the length; a full-attention layer
keeps keys and values, as many as the cache has room for. Each row has its own length; padding is never kept. Under a mesh each
device keeps its own rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax.mixers import Memory, Rings
from hybrid_jax.sharding import constrain


class Cache(NamedTuple):
    """lengths: [B] int32, the tokens remembered of each row. stages: of each stage each run's Memory, leaves [repeats,run,B,...]."""

    lengths: jax.Array
    stages: list[list[Memory]]


def empty(kept: Memory, layers: tuple[int, int]) -> Memory:
    """The memory of nothing of (repeats, run) recurrent layers; kept: what a layer returns, which is of one size after any x."""
    return jax.tree.map(lambda a: _dealt(jnp.zeros((*layers, *a.shape), a.dtype)), kept)


def empty_rings(layers: tuple[int, int], batch: int, heads: int, slots: int, width: int, dtype) -> Memory:
    """The memory of nothing of (repeats, run) attention layers."""
    rings = _dealt(jnp.zeros((*layers, batch, heads, slots, width), dtype))
    return Memory(Rings(rings, jnp.copy(rings)), ())  # two arrays, as both are given away to be written in place


def _dealt(memory: jax.Array) -> jax.Array:
    """[repeats,run,B,...], its rows dealt over the devices of the mesh in force."""
    return constrain(memory, "layers", "layers", "batch", *[None] * (memory.ndim - 3))


def read(memory: Memory, at: jax.Array) -> Memory:
    """That of one layer; at: [2] int32, its repeat and its place in the run."""
    if isinstance(memory.state, Rings):
        return memory._replace(state=memory.state._replace(at=at))
    return jax.tree.map(lambda a: a[at[0], at[1]], memory)


def write(memory: Memory, at: jax.Array, new: Memory, real: jax.Array) -> Memory:
    """The memory with what the layer ``at`` made of its own; real: [B,T] bool, False at padding."""
    if isinstance(memory.state, Rings):
        return new._replace(state=new.state._replace(at=None))
    going_on = jnp.any(real, axis=1)  # rows of padding alone stay as they are, also where an operator knows no padding

    def replace(a, new):
        kept = going_on.reshape(-1, *[1] * (new.ndim - 1))
        return a.at[at[0], at[1]].set(jnp.where(kept, new, a[at[0], at[1]]))

    return jax.tree.map(replace, memory, new)


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with rings of ``slots``, more than it has. None may have gone round yet, as its tokens stay where they are."""

    def one(memory: Memory) -> Memory:
        if not isinstance(memory.state, Rings):
            return memory
        room = [(0, 0)] * 4 + [(0, slots - memory.state.k.shape[4]), (0, 0)]
        return Memory(jax.tree.map(lambda a: jnp.pad(a, room), memory.state), ())

    return cache._replace(stages=[[one(memory) for memory in stage] for stage in cache.stages])


def held_bytes(cache: Cache) -> tuple[int, int]:
    """Those of keys and values, and of recurrent layers' states and convolutions."""
    memories = [memory for stage in cache.stages for memory in stage]
    rings = [memory for memory in memories if isinstance(memory.state, Rings)]
    in_all, in_rings = (sum(a.nbytes for a in jax.tree.leaves(some)) for some in (memories, rings))
    return in_rings, in_all - in_rings
