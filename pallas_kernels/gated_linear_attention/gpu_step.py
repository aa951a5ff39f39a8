"""What a warpgroup does with a chunk on a walk through them, :mod:`.gpu_walk`: it has a block of columns of the state S [K,V] in registers.

With the rows a_i, b_i and y_i of the chunk's tokens,

    out_i = r_i S^T a_i + sum_j P_ij y_j        S' = decay S + sum_i w_i b_i y_i^T

j <= i, or on the way backwards j >= i. With c_i the sum of the log decays a head since the chunk's start, of C tokens,

    P_ij = scale * (a_i . b_j) exp(-|c_i - c_j|)
    r_i = scale * exp(c_i), w_i = exp(c_C - c_i)        backwards r_i = exp(c_C - c_i), w_i = scale * exp(c_i)

where decays a channel are in a and b already: P is given, r and w are 1.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.gpu_layout import TILE, loaded, over_columns, over_rows, product

CHUNK = TILE
AT_ONCE = 2  # tiles of a state that are in shared memory at once


class Operands(NamedTuple):
    """Of a chunk: a, b [C,K] and y [C,V], bfloat16, a None where nothing is to be read.

    Of decays a head sums [2,C] float32, the c_i in two parts. Of decays a channel pairs [C,C] bfloat16, P or backwards its transpose, and
    totals [K] float32, the decays of the chunk.
    """

    a: jax.Array | None
    b: jax.Array
    y: jax.Array
    sums: jax.Array | None = None
    pairs: jax.Array | None = None
    totals: jax.Array | None = None


def step(chunk: Operands, state, buffers, keep, *, scale: float, reverse: bool):
    """state: its tiles [64,64] in float32, in registers; all operands, and ``buffers`` for intermediate results, are in shared memory.

    Calls ``keep(tiles, first)``, unless it is None, with tiles of the state in bfloat16. Returns (out in a buffer or None, the next state).
    """
    y = chunk.y
    if chunk.sums is not None:
        y, *buffers = buffers
        since, until = partial(_since_start, chunk.sums, scale), partial(_until_end, chunk.sums)
        weight_of_read, weight = (until, since) if reverse else (since, until)
        if buffers:
            pairs = buffers[0]  # which is for out later: a state of 256 keys leaves too few registers
            scores = product(chunk.a, chunk.b.T)
            pairs[...] = (scores * (scale * _between(chunk.sums, reverse))).astype(jnp.bfloat16)
        y[...] = (loaded(chunk.y).astype(jnp.float32) * over_rows(weight(), TILE)).astype(jnp.bfloat16)
    if chunk.a is None:
        plgpu.commit_smem()
        return None, _advanced(chunk, y, state)

    out, tiles = buffers
    found = _read(chunk, state, tiles, keep)
    if chunk.sums is not None:
        found *= over_rows(weight_of_read(), TILE)
    else:
        pairs = chunk.pairs.T if reverse else chunk.pairs
    out[...] = product(pairs, chunk.y, start=found).astype(jnp.bfloat16)
    return out, _advanced(chunk, y, state)


def _read(chunk, state, tiles, keep):
    """a S [C,64] in float32."""

    def run(total):
        for first in range(0, len(state), AT_ONCE):
            if first:  # until what is in the tiles has been read
                plgpu.wgmma_wait(0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            here = [tiles.at[k] for k in range(len(state[first : first + AT_ONCE]))]
            for k, tile in enumerate(here, first):
                tile[...] = state[k].astype(jnp.bfloat16)
            plgpu.commit_smem()
            if keep is not None:
                keep(here, first)
            for k, tile in enumerate(here, first):
                plgpu.wgmma(total, chunk.a.at[:, pl.ds(k * TILE, TILE)], tile)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((CHUNK, TILE), jnp.float32))


def _advanced(chunk, y, state):
    """The next state."""
    keys = [pl.ds(k * TILE, TILE) for k in range(len(state))]
    if chunk.sums is None:
        decays = [over_rows(loaded(chunk.totals.at[part], 1), TILE) for part in keys]
    else:
        decays = [jnp.exp(chunk.sums[0, CHUNK - 1] + chunk.sums[1, CHUNK - 1])] * len(state)

    def run(*totals):
        for total, x, decay, part in zip(totals, state, decays, keys, strict=True):
            total[...] = x * decay
            plgpu.wgmma(total, chunk.b.at[:, part].T, y)
        return [total[...] for total in totals]

    return pl.run_scoped(run, *[plgpu.ACC((TILE, TILE), jnp.float32)] * len(state))


def _since_start(sums, scale):
    """[C], scale * exp(c_i)."""
    coarse, fine = (loaded(sums.at[part], 1) for part in (0, 1))
    return scale * jnp.exp(coarse + fine)


def _until_end(sums):
    """[C], exp(c_C - c_i)."""
    coarse, fine = (sums[part, CHUNK - 1] - loaded(sums.at[part], 1) for part in (0, 1))
    return jnp.exp(coarse + fine)


def _between(sums, reverse):
    """[C,C], exp(-|c_i - c_j|) for j <= i, or backwards for j >= i, else 0."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))

    def difference(part):
        ours = over_rows(loaded(sums.at[part], 1), CHUNK)
        theirs = over_columns(loaded(sums.at[part], 0), CHUNK)
        return theirs - ours if reverse else ours - theirs

    return jnp.exp(jnp.where(i <= j if reverse else i >= j, difference(0) + difference(1), -jnp.inf))
