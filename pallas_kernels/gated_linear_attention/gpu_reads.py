"""What the tokens of a chunk read, of the chunk and of the state between chunks, by a Mosaic GPU kernel, all chunks at once.

The output and the three gradients of its operands are one computation, of row vectors a_i, b_j, y_j and a state:

    out_i = w_i a_i^T state + scale * sum_j (a_i . b_j) exp(-|c_i - c_j|) y_j

over j <= i with w_i = exp(c_i), or backwards in time over j >= i with w_i = exp(c_C - c_i). A warpgroup has 64 rows of the chunk, a CTA
the chunk and one or two tiles of 64 columns of a result; a, b and the state come in slices of 64 of what is summed over, by TMA. CTAs
that read the same tokens are neighbours in the grid, so that all but one of them find these in the L2 cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.gpu_layout import TILE, TILED, kernel, over_columns, over_rows, product

SLOTS = 2  # slices under way; no fewer than the tiles of a CTA, whose results pass through them


class Read(NamedTuple):
    """One result: names of the operands a, b, y [B,T,.,.] and state [B,N,HV,K,V].

    transposed: a and b are V wide, and the state is read as [V,K]. reverse: backwards in time.
    itself: the operand that the result is the gradient of, where sums of its products with the result are wanted too.
    """

    a: str
    b: str
    y: str
    state: str
    transposed: bool = False
    reverse: bool = False
    itself: str | None = None


def reads(which: tuple[Read, ...], operands: dict[str, jax.Array], sums, *, chunk: int, scale: float):
    """operands: bfloat16, T a multiple of C = ``chunk``, widths of 64; sums: [B,HV,2,T] as :func:`.tpu_decays.running_sums` has them.

    Returns for each of ``which`` the result [B,T,HV,width of y] in bfloat16, and where it has ``itself`` after it the products
    [B,HV,width / 64,2,T] in float32: of itself_i with what is read of the state, and of the tokens other than i.
    """
    B, HV, _, T = sums.shape
    names = sorted(operands)
    columns = [operands[read.y].shape[3] // TILE for read in which]
    tiles = 2 if all(count % 2 == 0 for count in columns) else 1
    groups = chunk // TILE

    def body(*refs):
        given = dict(zip(names, refs, strict=False))
        sums_ref, outputs = refs[len(names)], iter(refs[len(names) + 1 :])
        results = [(next(outputs), next(outputs) if read.itself else None) for read in which]
        scratch, first = list(outputs), 0
        *place, position = (lax.axis_index(name) for name in ("batch", "chunk", "head", "group", "block"))
        for read, (out_ref, products_ref), count in zip(which, results, columns, strict=True):
            tile = tiles * position - first

            @pl.when((tile >= 0) & (tile < count))
            def _(read=read, tile=tile, out_ref=out_ref, products_ref=products_ref):
                _read(read, given, sums_ref, out_ref, products_ref, (*place, tile), scratch, chunk, scale)

            first += count

    shapes = []
    for read, count in zip(which, columns, strict=True):
        shapes.append(jax.ShapeDtypeStruct((B, T, HV, count * TILE), jnp.bfloat16))
        if read.itself:
            shapes.append(jax.ShapeDtypeStruct((B, HV, count, 2, T), jnp.float32))

    def slices(*shape):
        return plgpu.SMEM((*shape, TILE), jnp.bfloat16, transforms=TILED)

    return kernel(
        body,
        out_type=shapes,
        scratch_types=[
            slices(SLOTS, chunk),
            slices(SLOTS, chunk),
            slices(SLOTS, tiles, TILE),
            slices(tiles, chunk),
            plgpu.SMEM((2, chunk), jnp.float32),
            plgpu.SMEM((groups, tiles, 2, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + tiles, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=groups, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=1 + tiles),
            plgpu.Barrier(num_arrivals=tiles, num_barriers=groups),
        ],
        grid=(B, T // chunk, HV, sum(columns) // tiles),
        grid_names=("batch", "chunk", "head", "block"),
        num_threads=groups,
        thread_name="group",
        name="gated_linear_attention_reads",
    )(*(operands[name] for name in names), sums)


def _read(read, operands, sums_ref, out_ref, products_ref, place, scratch, chunk, scale):
    """A CTA's part of one result: a chunk of a head, columns from those of ``tile`` on."""
    a_smem, b_smem, state_smem, y_smem, sums_smem, products_smem, loaded, consumed, rest_loaded, itself_loaded = scratch
    b, n, h, group, tile = place
    steps, tiles, groups = operands[read.a].shape[3] // TILE, y_smem.shape[0], chunk // TILE
    own = pl.ds(group * TILE, TILE)

    def tokens(name, columns, start=0, count=chunk):
        heads = out_ref.shape[2] // operands[name].shape[2]
        return operands[name].at[b, pl.ds(n * chunk + start, count), h // heads, pl.ds(columns * TILE, TILE)]

    def load(step):
        slot = step % SLOTS
        plgpu.copy_gmem_to_smem(tokens(read.a, step), a_smem.at[slot], loaded.at[slot])
        plgpu.copy_gmem_to_smem(tokens(read.b, step), b_smem.at[slot], loaded.at[slot])
        for t in range(tiles):
            rows, columns = (tile + t, step) if read.transposed else (step, tile + t)
            state = operands[read.state].at[b, n, h, pl.ds(rows * TILE, TILE), pl.ds(columns * TILE, TILE)]
            plgpu.copy_gmem_to_smem(state, state_smem.at[slot, t], loaded.at[slot])

    @pl.when(group == 0)
    def _():
        for step in range(min(steps, SLOTS)):
            load(step)
        for t in range(tiles):
            plgpu.copy_gmem_to_smem(tokens(read.y, tile + t), y_smem.at[t], rest_loaded)
        plgpu.copy_gmem_to_smem(sums_ref.at[b, h, :, pl.ds(n * chunk, chunk)], sums_smem, rest_loaded)

    def contract(scores, *of_state):
        for step in range(steps):
            slot = step % SLOTS
            plgpu.barrier_wait(loaded.at[slot])
            mine = a_smem.at[slot, own]
            plgpu.wgmma(scores, mine, b_smem.at[slot].transpose((1, 0)))
            for t in range(tiles):
                state = state_smem.at[slot, t]
                plgpu.wgmma(of_state[t], mine, state.transpose((1, 0)) if read.transposed else state)
            if step + SLOTS < steps:
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed.at[slot])

                @pl.when(group == 0)
                def _(step=step, slot=slot):
                    plgpu.barrier_wait(consumed.at[slot])
                    load(step + SLOTS)

        return scores[...], *(x[...] for x in of_state)

    accumulators = [plgpu.ACC((TILE, width), jnp.float32) for width in (chunk, *[TILE] * tiles)]
    scores, *of_state = pl.run_scoped(contract, *accumulators)
    # No more is to come into the slices, and their rows of this warpgroup are no other's.
    mine = [a_smem.at[t, own] for t in range(tiles)]
    if read.itself:
        for t in range(tiles):
            plgpu.copy_gmem_to_smem(tokens(read.itself, tile + t, group * TILE, TILE), mine[t], itself_loaded.at[group])
    plgpu.barrier_wait(rest_loaded)

    pairs, alone, weights = _weighted(read, scores, sums_smem, group, scale)
    here = pl.ds(n * chunk + group * TILE, TILE)
    for t in range(tiles):
        of_tokens = product(*(x for part in range(groups) for x in (pairs[part], y_smem.at[t, pl.ds(part * TILE, TILE)])))
        from_state = over_rows(weights, TILE) * of_state[t]
        out = from_state + of_tokens
        if read.itself:
            if t == 0:
                plgpu.barrier_wait(itself_loaded.at[group])
            itself = mine[t][...].astype(jnp.float32)
            for part, x in enumerate((from_state, of_tokens)):
                products_smem[group, t, part] = jnp.sum(itself * x, axis=1)
            out += over_rows(alone, TILE) * y_smem[t, own].astype(jnp.float32)
        mine[t][...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine[t], out_ref.at[b, here, h, pl.ds((tile + t) * TILE, TILE)])
        if read.itself:
            plgpu.copy_smem_to_gmem(products_smem.at[group, t], products_ref.at[b, h, tile + t, :, here])
    plgpu.wait_smem_to_gmem(0)


def _weighted(read, scores, sums_smem, group, scale):
    """Of a warpgroup's ``scores`` [64,C]: of pairs with their decays, in parts [64,64] of bfloat16; what is apart [64]; and w [64]."""
    chunk = sums_smem.shape[1]
    coarse, fine = (sums_smem[part, pl.ds(group * TILE, TILE)] for part in (0, 1))
    pairs, alone = [], 0
    for part in range(chunk // TILE):
        columns, own_scores = pl.ds(part * TILE, TILE), scores[:, part * TILE : (part + 1) * TILE]
        i, j = (lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in (0, 1))
        ahead = i - j + (group - part) * TILE
        # A token with itself is apart where its gradient is: there is no decay between them.
        before = (ahead < 0 if read.reverse else ahead > 0) if read.itself else (ahead <= 0 if read.reverse else ahead >= 0)
        since = [over_rows(x, TILE) - over_columns(sums_smem[k, columns], TILE) for k, x in enumerate((coarse, fine))]
        log_between = -since[0] - since[1] if read.reverse else since[0] + since[1]
        if read.itself:
            alone += scale * jnp.sum(jnp.where(ahead == 0, own_scores, 0), axis=1)
        own_pairs = (scale * own_scores * jnp.exp(jnp.where(before, log_between, -jnp.inf))).astype(jnp.bfloat16)
        # One part after the other: both at once would not fit the registers.
        own_pairs, scores = lax.optimization_barrier((own_pairs, scores))
        pairs.append(own_pairs)
    if read.reverse:
        weights = jnp.exp((sums_smem[0, chunk - 1] - coarse) + (sums_smem[1, chunk - 1] - fine))
    else:
        weights = scale * jnp.exp(coarse + fine)
    return pairs, alone, weights
