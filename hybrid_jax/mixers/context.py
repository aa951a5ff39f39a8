"""What a mixer may know beside its input."""

from typing import Any, NamedTuple

import jax


class Context(NamedTuple):
    """The same for all layers but for the lower bound.

    segment_ids: [B,T] int32 or None (one document a row); 0 marks padding.
    positions: [B,T] int32, a token's place in its document.
    lengths: [B] int32, the tokens before x that the layers' memories hold; None where there are no memories.
    lower_bound: [D] float32 of this layer's forget gate, where the model has one (HGRN, HGRN2).
    """

    segment_ids: jax.Array | None
    positions: jax.Array
    lengths: jax.Array | None = None
    lower_bound: jax.Array | None = None


class Memory(NamedTuple):
    """What a mixer keeps of the tokens before x, for decoding. Without any, as in training, it is ``Memory()``.

    state: the state of its operator: of a recurrence, float32; of attention, keys and values (see :class:`KeysValues`).
    tails: of its short convolutions, the last inputs [B,width-1,D]; () where it has none.
    """

    state: Any = None
    tails: tuple[jax.Array, ...] | None = None


class KeysValues(NamedTuple):
    """Of attention. In a cache, rings: token t of a row in slot t % S. From a mixer, those of the tokens of x, for the cache to take.

    k, v: [B,S or T,HK,K].
    """

    k: jax.Array
    v: jax.Array
