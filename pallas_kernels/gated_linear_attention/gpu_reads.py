"""What the tokens of a chunk read, of the chunk and of the state between chunks, by a Mosaic GPU kernel, all chunks at once.

The output and the three gradients of its operands are one computation, of row vectors a_i, b_j, y_j and a state:

    out_i = w_i a_i^T state + scale * sum_j (a_i . b_j) exp(-|c_i - c_j|) y_j

over j <= i with w_i = exp(c_i), or backwards in time over j >= i with w_i = exp(c_C - c_i). A warpgroup has 64 rows of the chunk, a CTA
the chunk and 64 columns of a result; a, b and the state come in slices of 64 of what is summed over, by TMA. CTAs that read the
same tokens are neighbours in the grid, so that all but one of them find these in the L2 cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.gpu_layout import PARAMS, TILE, TILED, over_columns, over_rows, product

SLOTS = 2  # slices under way


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
    blocks = [operands[read.y].shape[3] // TILE for read in which]

    def body(*refs):
        given = dict(zip(names, refs, strict=False))
        sums_ref, outputs = refs[len(names)], iter(refs[len(names) + 1 :])
        results = [(next(outputs), next(outputs) if read.itself else None) for read in which]
        scratch, first = list(outputs), 0
        *place, position = (lax.axis_index(name) for name in ("batch", "chunk", "head", "group", "block"))
        for read, (out_ref, products_ref), count in zip(which, results, blocks, strict=True):
            block = position - first

            @pl.when((block >= 0) & (block < count))
            def _(read=read, block=block, out_ref=out_ref, products_ref=products_ref):
                _read(read, given, sums_ref, out_ref, products_ref, (*place, block), scratch, chunk, scale)

            first += count

    shapes = []
    for read, count in zip(which, blocks, strict=True):
        shapes.append(jax.ShapeDtypeStruct((B, T, HV, count * TILE), jnp.bfloat16))
        if read.itself:
            shapes.append(jax.ShapeDtypeStruct((B, HV, count, 2, T), jnp.float32))
    groups = chunk // TILE
    tokens = plgpu.SMEM((SLOTS, chunk, TILE), jnp.bfloat16, transforms=TILED)
    return plgpu.kernel(
        body,
        out_type=shapes,
        scratch_types=[
            tokens,
            tokens,
            plgpu.SMEM((SLOTS, TILE, TILE), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((chunk, TILE), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((2, chunk), jnp.float32),
            plgpu.SMEM((groups, 2, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=groups, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=groups),
        ],
        grid=(B, T // chunk, HV, sum(blocks)),
        grid_names=("batch", "chunk", "head", "block"),
        num_threads=groups,
        thread_name="group",
        compiler_params=PARAMS,
        kernel_name="gated_linear_attention_reads",
    )(*(operands[name] for name in names), sums)


def _read(read, operands, sums_ref, out_ref, products_ref, place, scratch, chunk, scale):
    """A CTA's part of one result: the columns ``block`` of a chunk of a head."""
    a_smem, b_smem, state_smem, y_smem, sums_smem, products_smem, loaded, consumed, rest_loaded, itself_loaded = scratch
    b, n, h, group, block = place
    steps, own = operands[read.a].shape[3] // TILE, pl.ds(group * TILE, TILE)

    def tokens(name, columns, start=0, count=chunk):
        heads = out_ref.shape[2] // operands[name].shape[2]
        return operands[name].at[b, pl.ds(n * chunk + start, count), h // heads, pl.ds(columns * TILE, TILE)]

    def load(step):
        slot = step % SLOTS
        rows, columns = (block, step) if read.transposed else (step, block)
        state = operands[read.state].at[b, n, h, pl.ds(rows * TILE, TILE), pl.ds(columns * TILE, TILE)]
        plgpu.copy_gmem_to_smem(tokens(read.a, step), a_smem.at[slot], loaded.at[slot])
        plgpu.copy_gmem_to_smem(tokens(read.b, step), b_smem.at[slot], loaded.at[slot])
        plgpu.copy_gmem_to_smem(state, state_smem.at[slot], loaded.at[slot])

    @pl.when(group == 0)
    def _():
        for step in range(min(steps, SLOTS)):
            load(step)
        plgpu.copy_gmem_to_smem(tokens(read.y, block), y_smem, rest_loaded)
        plgpu.copy_gmem_to_smem(sums_ref.at[b, h, :, pl.ds(n * chunk, chunk)], sums_smem, rest_loaded)

    def contract(scores, of_state):
        for step in range(steps):
            slot = step % SLOTS
            plgpu.barrier_wait(loaded.at[slot])
            plgpu.wgmma(scores, a_smem.at[slot, own], b_smem.at[slot].transpose((1, 0)))
            state = state_smem.at[slot]
            plgpu.wgmma(of_state, a_smem.at[slot, own], state.transpose((1, 0)) if read.transposed else state)
            if step + SLOTS < steps:
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed.at[slot])

                @pl.when(group == 0)
                def _(step=step, slot=slot):
                    plgpu.barrier_wait(consumed.at[slot])
                    load(step + SLOTS)

        return scores[...], of_state[...]

    scores, of_state = pl.run_scoped(contract, plgpu.ACC((TILE, chunk), jnp.float32), plgpu.ACC((TILE, TILE), jnp.float32))
    # No more is to come into the slices, and their rows of this warpgroup are no other's.
    mine = a_smem.at[0, own]
    if read.itself:
        plgpu.copy_gmem_to_smem(tokens(read.itself, block, group * TILE, TILE), mine, itself_loaded.at[group])
    plgpu.barrier_wait(rest_loaded)

    i, j = (lax.broadcasted_iota(jnp.int32, (TILE, chunk), axis) + offset for axis, offset in ((0, group * TILE), (1, 0)))
    ahead = j - i if read.reverse else i - j
    since = [over_rows(sums_smem[part, own], chunk) - over_columns(sums_smem[part], TILE) for part in (0, 1)]
    log_between = since[0] + since[1]
    between = jnp.exp(jnp.where(ahead >= 0, -log_between if read.reverse else log_between, -jnp.inf))
    pairs = scale * scores * between
    if read.itself:  # a token with itself is apart: there is no decay between them
        alone = jnp.sum(jnp.where(ahead == 0, pairs, 0), axis=1)
        pairs = jnp.where(ahead == 0, 0, pairs)
    of_tokens = product(pairs.astype(jnp.bfloat16), y_smem)
    coarse, fine = (sums_smem[part, own] for part in (0, 1))
    if read.reverse:
        weights = jnp.exp((sums_smem[0, chunk - 1] - coarse) + (sums_smem[1, chunk - 1] - fine))
    else:
        weights = scale * jnp.exp(coarse + fine)
    of_state = over_rows(weights, TILE) * of_state
    out = of_state + of_tokens
    if read.itself:
        plgpu.barrier_wait(itself_loaded.at[group])
        itself = mine[...].astype(jnp.float32)
        for part, x in enumerate((of_state, of_tokens)):
            products_smem[group, part] = jnp.sum(itself * x, axis=1)
        out += over_rows(alone, TILE) * y_smem[own, :].astype(jnp.float32)
    mine[...] = out.astype(jnp.bfloat16)
    plgpu.commit_smem()
    here = pl.ds(n * chunk + group * TILE, TILE)
    plgpu.copy_smem_to_gmem(mine, out_ref.at[b, here, h, pl.ds(block * TILE, TILE)])
    if read.itself:
        plgpu.copy_smem_to_gmem(products_smem.at[group], products_ref.at[b, h, block, :, here])
    plgpu.wait_smem_to_gmem(0)
