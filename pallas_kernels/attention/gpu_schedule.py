"""Which tiles of attention's Hopper kernels which program goes through, and which blocks of tokens each of them meets.

A program goes through its tiles one after the other, so that a tile is loaded while the one before it is computed. They are dealt out
here, by how many blocks they meet: the tokens are cut into sections, of a few tiles for each multiprocessor, and each section's tiles go
to as many programs, from the heaviest to the lightest, there and back. Sections come one after the other, so that tiles that
meet the same keys are computed at much the same time; and a multiprocessor that is held up, as by a collective, takes fewer programs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.reach import Ranges

TILE = 128  # tokens that a program has at a time
ROUNDS = 8  # tiles of a program: with more a multiprocessor that is held up holds up others, with fewer it waits more for its first


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

    Behind a program's items there is one more, with their number as ``tile``, and their blocks ``before`` it; b is -1.
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


def dealt(visits: jax.Array, heads: int, multiprocessors: int) -> jax.Array:
    """visits [B,tiles,4] (:class:`Visits`), of each head the same -> [programs,ROUNDS or fewer + 1,8] int32 (:class:`Item`).

    Every tile of every head is in it once, a program's in their order.
    """
    B, tiles = visits.shape[:2]
    total = B * heads * tiles
    programs = min(multiprocessors, total)
    rounds = min(ROUNDS, -(-total // programs))
    steps = jnp.repeat(Visits(*jnp.unstack(visits, axis=2)).steps[:, None], heads, axis=1).reshape(-1)
    steps = jnp.pad(steps, (0, -total % (rounds * programs)), constant_values=-1).reshape(-1, rounds * programs)
    heaviest_first = jnp.argsort(-steps, axis=1) + jnp.arange(len(steps))[:, None] * steps.shape[1]
    there = heaviest_first.reshape(-1, rounds, programs)
    and_back = jnp.where(jnp.arange(rounds)[:, None] % 2 == 0, there, there[:, :, ::-1])
    which = jnp.sort(and_back.swapaxes(1, 2).reshape(-1, rounds), axis=1)
    real = which < total

    b, of_row = jnp.divmod(jnp.where(real, which, 0), heads * tiles)
    h, tile = jnp.divmod(of_row, tiles)
    visits = jnp.where(real[:, :, None], visits[b, tile], 0)
    steps = visits[:, :, 3] - visits[:, :, 0]
    before = jnp.cumsum(steps, axis=1) - steps
    items = jnp.concatenate([jnp.stack([jnp.where(real, b, -1), tile, h], axis=2), visits, before[:, :, None]], axis=2)
    behind = jnp.zeros_like(items[:, :1]).at[:, 0, 0].set(-1).at[:, 0, 1].set(real.sum(1)).at[:, 0, 7].set(steps.sum(1))
    return jnp.concatenate([items, behind], axis=1).astype(jnp.int32)


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
