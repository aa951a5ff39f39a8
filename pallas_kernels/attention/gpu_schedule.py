"""Which tiles of attention's Hopper kernels which program goes through, and which blocks of tokens each of them meets.

There are as many programs as multiprocessors, and each goes through its tiles one after the other, so that a tile is loaded while the one
before it is computed. They are dealt out here, by how many blocks they meet: those of a section of a few rounds, whose keys and
values the L2 cache holds, from the heaviest to the lightest, there and back over the programs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.reach import Ranges

TILE = 128  # tokens that a program has at a time
ROUNDS = 4  # of a section
TURN = 50  # programs that a section begins behind the one before it, for none to have the heaviest tile of each
BEHIND = 1  # entry behind a program's last, which says how many blocks they have


class Visits(NamedTuple):
    """Blocks from ``begin`` to before ``end``, of those from ``whole`` to before ``whole_end`` all pairs of tokens; [...] int32 each."""

    begin: jax.Array
    whole: jax.Array
    whole_end: jax.Array
    end: jax.Array

    @property
    def checked(self):
        """How many come first, not whole."""
        return self.whole - self.begin + self.end - self.whole_end

    @property
    def steps(self):
        return self.end - self.begin

    def block(self, step):
        """The ``step``-th block gone through."""
        before = self.whole - self.begin
        checked = self.begin + step + jnp.where(step < before, 0, self.whole_end - self.whole)
        return jnp.where(step < self.checked, checked, self.whole + step - self.checked)


class Item(NamedTuple):
    """A tile of a program: row b, of the row's the tile-th, head h; visits: its blocks; before: those of the program's items before it.

    b is -1 where there is no item: behind a program's last, whose ``before`` are all its blocks.
    """

    b: jax.Array
    tile: jax.Array
    h: jax.Array
    visits: Visits
    before: jax.Array

    @classmethod
    def read(cls, items, program, n) -> "Item":
        """The n-th of a program, of :func:`dealt`."""
        b, tile, h, *visits, before = (items[program, n, i] for i in range(8))
        return cls(b, tile, h, Visits(*visits), before)


def dealt(visits: jax.Array, heads: int, programs: int) -> jax.Array:
    """visits [B,tiles,4] (:class:`Visits`), of each head the same -> [programs,rounds + BEHIND,8] int32 (:class:`Item`).

    No more programs than there are tiles. Every tile of every head is in it once, and all of a program's before where it has none.
    """
    B, tiles = visits.shape[:2]
    count = B * heads * tiles
    programs = min(programs, count)
    rounds = -(-count // programs)
    of_section = min(ROUNDS, rounds)
    steps = jnp.repeat(Visits(*jnp.unstack(visits, axis=2)).steps[:, None], heads, axis=1).reshape(-1)
    steps = jnp.pad(steps, (0, -count % (of_section * programs)), constant_values=-1).reshape(-1, of_section * programs)
    sections = jnp.arange(len(steps))[:, None]
    heaviest_first = jnp.argsort(-steps, axis=1) + sections * steps.shape[1]

    place = jnp.arange(programs) - TURN * sections  # of each program, in a section's rounds there
    place = jnp.stack([place % programs if i % 2 == 0 else (-1 - place) % programs for i in range(of_section)], axis=1)
    of_rounds = heaviest_first.reshape(-1, of_section, programs)
    which = jnp.take_along_axis(of_rounds, place, axis=2).reshape(-1, programs)[:rounds].T  # [programs,rounds]

    there = which < count
    b, of_row = jnp.divmod(jnp.where(there, which, 0), heads * tiles)
    h, tile = jnp.divmod(of_row, tiles)
    visits = jnp.where(there[:, :, None], visits[b, tile], 0)
    entries = jnp.concatenate([jnp.where(there, b, -1)[:, :, None], jnp.stack([tile, h], axis=2), visits], axis=2)
    entries = jnp.pad(entries, [(0, 0), (0, BEHIND), (0, 0)])
    entries = entries.at[:, rounds:, 0].set(-1)
    steps = entries[:, :, 6] - entries[:, :, 3]
    before = jnp.cumsum(steps, axis=1) - steps
    return jnp.concatenate([entries, before[:, :, None]], axis=2).astype(jnp.int32)


def blocks_of_keys(block: int, reach: Ranges, places) -> jax.Array:
    """For each tile of queries, [B,tiles,4] (:class:`Visits`), from the first block of keys whose last one the first query reaches to the
    tile's own. block: tokens of one; places: [tiles], which tile of the row each tile of queries is.
    """
    unreached = reach.rank[:, None, block - 1 :: block] < reach.first[:, ::TILE, None]
    begin = jnp.sum(unreached, axis=2, dtype=jnp.int32)
    end = (places + 1) * (TILE // block)
    first, last = _cut(reach.first, TILE).max(2), _cut(reach.last, TILE).min(2)
    keys = _cut(reach.key, block)
    whole = (first[:, :, None] <= keys.min(2)[:, None]) & (keys.max(2)[:, None] <= last[:, :, None])
    return _visits(jnp.minimum(begin, end), jnp.broadcast_to(end, begin.shape), whole)


def blocks_of_queries(block: int, reach: Ranges, places) -> jax.Array:
    """For each tile of keys, [B,tiles,4] (:class:`Visits`), from the first block of queries not before it to the last whose first reaches
    its last key.
    """
    reaching = reach.first[:, None, ::block] <= reach.rank[:, TILE - 1 :: TILE, None]
    end = jnp.sum(reaching, axis=2, dtype=jnp.int32)
    begin = jnp.sum(places < jnp.arange(end.shape[1])[:, None], axis=1, dtype=jnp.int32) * (TILE // block)
    first, last = _cut(reach.first, block).max(2), _cut(reach.last, block).min(2)
    keys = _cut(reach.key, TILE)
    whole = (first[:, None] <= keys.min(2)[:, :, None]) & (keys.max(2)[:, :, None] <= last[:, None])
    return _visits(jnp.minimum(begin, end), end, whole)


def _cut(x, length):
    """[B,T] -> [B,T/length,length]."""
    return x.reshape(len(x), -1, length)


def _visits(begin, end, whole):
    """[B,tiles,4] of begin and end [B,tiles] and of which blocks are whole [B,tiles,blocks]: the first run of these."""
    at = jnp.arange(whole.shape[2], dtype=jnp.int32)
    whole &= (begin[:, :, None] <= at) & (at < end[:, :, None])
    first = jnp.min(jnp.where(whole, at, end[:, :, None]), axis=2)
    past = jnp.min(jnp.where(~whole & (at >= first[:, :, None]), at, end[:, :, None]), axis=2)
    return jnp.stack(Visits(begin, first, past, end), axis=2)
