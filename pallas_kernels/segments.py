"""What `segment_ids` mean, said once for all operators.

A row holds several documents, told apart by a positive id a token; 0 marks padding. A document ends where the id of the
next *real* token differs, so an id may be used again later in the row, and padding inside a document does not end it.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
    """Segments of a row, counted from 0.

    index: [B,T] int32, never falling: the document a token belongs to. Padding counts with the real token before it
        (before the first real token: with that one), so equal indices are all that a kernel has to compare.
    real: [B,T] bool, False at padding.
    """

    index: jax.Array
    real: jax.Array

    @property
    def starts(self) -> jax.Array:
        """[B,T] bool, True at the first token of every document but a row's first."""
        return jnp.diff(self.index, axis=1, prepend=0) > 0


def number(segment_ids: jax.Array) -> Segments:
    """Number the documents of [B,T] int ``segment_ids`` (0 = padding) in order of appearance."""
    real = segment_ids != 0

    def later(a, b):  # the id of the last real token so far, 0 before there is one
        return jnp.where(b != 0, b, a)

    last_real = jax.lax.associative_scan(later, segment_ids, axis=1)
    before = jnp.pad(last_real[:, :-1], [(0, 0), (1, 0)])
    starts = real & (before != 0) & (segment_ids != before)
    return Segments(jnp.cumsum(starts, axis=1, dtype=jnp.int32), real)


def one_segment(B: int, T: int) -> Segments:
    """The numbering of rows that hold one document each and no padding."""
    return Segments(jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), bool))
