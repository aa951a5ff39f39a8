"""What each token attends to, as a range: what "causal, in its document, in its window, never padding" comes to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.segments import Segments


class Ranges(NamedTuple):
    """In ranks: how many real tokens stand before a token in its row. All [B,T] int32; rank and first never fall along a row.

    rank: of a token, as a key; of padding, that of the real token before it.
    first, last: a query attends to the keys from its document's first, or its window's, up to itself; at padding to none, and behind a
        row's last real token to none that could be.
    key: a key's rank; in no range at padding.
    """

    rank: jax.Array
    first: jax.Array
    last: jax.Array
    key: jax.Array

    @property
    def reached(self) -> jax.Array:
        """How many keys a query attends to, none where it is padding."""
        return jnp.maximum(self.last - self.first + 1, 0)

    def of_queries(self, places: jax.Array, T: int) -> "Ranges":
        """Those of the queries of the stretches of T tokens at ``places``, and of all keys."""
        return self._replace(first=stretches(self.first, places, T), last=stretches(self.last, places, T))


def blocks_at(places: jax.Array, blocks: int) -> jax.Array:
    """The blocks of the stretches at ``places``, each of so many, one after the other: [len(places) x blocks] int32."""
    return (places[:, None] * blocks + jnp.arange(blocks, dtype=jnp.int32)).reshape(-1)


def stretches(x: jax.Array, places: jax.Array, T: int) -> jax.Array:
    """Of [B,all T,...], cut into stretches of T tokens, those at ``places``, one after the other."""
    cut = x.reshape(len(x), -1, T, *x.shape[2:])
    return cut[:, places].reshape(len(x), -1, *x.shape[2:])


def ranges(segments: Segments, window: int | None, padding: int = 0) -> Ranges:
    """Those of ``segments`` with ``padding`` more tokens at the end of each row."""
    index, real = segments
    T, end = index.shape[1], [(0, 0), (0, padding)]
    index, real = jnp.pad(index, end, mode="edge"), jnp.pad(real, end)
    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    starts = jnp.diff(index, axis=1, prepend=0) > 0
    first = jax.lax.cummax(jnp.where(starts, rank, 0), axis=1)
    if window is not None:
        first = jnp.maximum(first, rank - window + 1)
    first = jnp.where(real | (rank < rank[:, -1:]), first, T)
    return Ranges(rank, first, jnp.where(real, rank, -1), jnp.where(real, rank, T))


def ranges_of_whole_rows(B: int, T: int, window: int | None, padding: int = 0) -> Ranges:
    """:func:`ranges` of rows that hold one document each: said outright, as XLA takes seconds to add up what it knows."""
    place = jax.lax.broadcasted_iota(jnp.int32, (B, T + padding), 1)
    rank = jnp.minimum(place, T - 1)
    first = jnp.zeros_like(rank) if window is None else jnp.maximum(rank - window + 1, 0)
    return Ranges(rank, jnp.where(place < T, first, T), jnp.where(place < T, rank, -1), jnp.where(place < T, rank, T))
