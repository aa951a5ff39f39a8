"""What a mixer may know beside its input."""

from typing import NamedTuple

import jax

from hybrid_jax.layers.rotary import positions
from hybrid_jax.mixers.rings import Rings


class Context(NamedTuple):
    """The same for all layers but for the lower bound.

    segment_ids: [B,T] int32 or None (one document a row); 0 marks padding.
    positions: [B,T] int32, a token's place in its document, or None where x is the whole of its documents.
    lengths, real: [B] int32, the tokens before x that the layers' memories hold, and [B,T] bool, False at padding, what segment_ids
        say but for a single token, where those are None; None where there are no memories.
    lower_bound: [D] float32 of this layer's forget gate, where the model has one (HGRN, HGRN2).
    """

    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None
    lengths: jax.Array | None = None
    real: jax.Array | None = None
    lower_bound: jax.Array | None = None

    def places(self, x: jax.Array) -> jax.Array:
        """The positions [B,T] of x [B,T,D]; counted where they are not given."""
        return positions(*x.shape[:2], self.segment_ids) if self.positions is None else self.positions


class Memory(NamedTuple):
    """What a mixer keeps of the tokens before x, for decoding. Without any, as in training, it is ``Memory()``.

    state: of its operator: float32 of a recurrence; of attention the :class:`Rings` of keys and values.
    tails: of its short convolutions, the last inputs [B,width-1,D]; () where it has none.
    """

    state: jax.Array | Rings | None = None
    tails: tuple[jax.Array, ...] | None = None


ONE_DOCUMENT, NO_MEMORY = Context(), Memory()  # what a mixer called on x alone takes it for: a document a row, all of it
