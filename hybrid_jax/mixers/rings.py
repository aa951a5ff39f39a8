"""Where the full-attention layers keep keys and values while decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rings(NamedTuple):
    """Keys and values of a run of layers: token t of a row in slot t % S, until the token S later takes its place.

    Layers write into the arrays of all of them and read their part of what they wrote: then XLA does it in place. Were they read
    first, or passed on layer by layer, every step would copy them all.

    k, v: [repeats,run,B,HK,S,K].
    at: [2] int32, the layer whose turn it is; None between the steps.
    """

    k: jax.Array
    v: jax.Array
    at: jax.Array | None = None

    def write(self, k: jax.Array, v: jax.Array, lengths: jax.Array, real: jax.Array) -> "Rings":
        """With the real tokens of k, v [B,T,HK,K], each after the ``lengths`` [B] tokens before them; real: [B,T] bool, at most S
        of a row."""
        slots = self.k.shape[4]
        place = lengths[:, None] + jnp.cumsum(real, axis=1) - 1
        slot = jnp.where(real, place % slots, slots)  # beyond the ring: dropped
        index = (self.at[0], self.at[1], jnp.arange(len(lengths))[:, None], slice(None), slot)
        return Rings(self.k.at[index].set(k, mode="drop"), self.v.at[index].set(v, mode="drop"), self.at)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """k and v [B,HK,S,K] of the layer whose turn it is."""
        return self.k[self.at[0], self.at[1]], self.v[self.at[0], self.at[1]]
