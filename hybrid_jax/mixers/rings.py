"""Where the full-attention layers keep keys and values while decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of x [B,T,HK,K] in a ring [repeats,run,B,HK,S,K], at indices [B,T,(repeat, layer of the run, slot)]. Rows are a batching dimension,
# not an index, so that XLA sees that devices with rows of their own need nothing of each other's.
SLOTS = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 1, 4),
    scatter_dims_to_operand_dims=(0, 1, 4),
    operand_batching_dims=(2,),
    scatter_indices_batching_dims=(0,),
)


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
        index = jnp.concatenate([jnp.broadcast_to(self.at, (*slot.shape, 2)), slot[..., None]], axis=2)

        def put(ring, x):
            return jax.lax.scatter(ring, index, x, SLOTS, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)

        return Rings(put(self.k, k), put(self.v, v), self.at)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """k and v [B,HK,S,K] of the layer whose turn it is."""
        return self.k[self.at[0], self.at[1]], self.v[self.at[0], self.at[1]]
