"""What a mixer may know beside its input."""

from typing import NamedTuple

import jax


class Context(NamedTuple):
    """The same for all layers but for the lower bound.

    segment_ids: [B,T] int32 or None (one document a row); 0 marks padding.
    positions: [B,T] int32, a token's place in its document.
    lower_bound: [D] float32 of this layer's forget gate, where the model has one (HGRN, HGRN2).
    """

    segment_ids: jax.Array | None
    positions: jax.Array
    lower_bound: jax.Array | None = None
