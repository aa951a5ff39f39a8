"""A walk through the chunks of a sequence, forwards or backwards, by Mosaic GPU: the state in registers, the operands from memory.

Forwards it takes q, k and v and gives o; backwards, with the state's gradient, k, q and the gradient of o, and gives that of v. What it
does with a chunk is :mod:`.gpu_step`. The grid is (B, HV, blocks of V). Of a CTA's warpgroups each has TILE columns of the state, but for
the last one, which loads, chunk after chunk, as far ahead as there are buffers.

Where that makes too few CTAs the sequence is cut into pieces: what each adds to a state of zero comes first, then all of them start from
their states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_linear_attention.gpu_layout import TILE, TILED, laid_out_kernel, product
from pallas_kernels.gated_linear_attention.gpu_step import AT_ONCE, CHUNK, Operands, step

STAGES = 2  # chunks in shared memory
ENOUGH = 128  # CTAs, one a multiprocessor: nearly all of them
LEAST = 8  # chunks a piece


def walk(operands: Operands, start, *, scale: float = 1.0, reverse: bool = False, every: int = 0):
    """From the state ``start`` [B,HV,K,V] in float32, before the first chunk or with ``reverse`` after the last.

    operands: as there, of the whole sequence: a, b [B,T,H,K], y [B,T,HV,V], T of N whole chunks, and either sums [B,N,HV,2,C] or
    pairs [B,T,HV,C] and totals [B,N,HV,K].

    Returns out [B,T,HV,V] in bfloat16, the state at the other end in float32, and where ``every`` is not 0 those at every so many chunks
    [B,N/every,HV,K,V] in bfloat16: each before, or with ``reverse`` after, so many chunks.
    """
    (B, T, HV, V), N = operands.y.shape, operands.y.shape[1] // CHUNK
    ctas, pieces = B * HV * V // (_groups(V) * TILE), 1
    while pieces * ctas < ENOUGH and N % (2 * pieces * max(every, 1)) == 0 and N >= 2 * pieces * LEAST:
        pieces *= 2
    if pieces <= 2:  # two would gain nothing: what comes first takes as long as what they save
        return _walk(operands, start, scale, reverse, every)

    cut = Operands(*(x if x is None else x.reshape(B * pieces, x.shape[1] // pieces, *x.shape[2:]) for x in operands))
    (increments,) = _walk(cut._replace(a=None, pairs=None), None, scale, reverse)
    if cut.totals is None:
        total = jnp.exp(jnp.sum(cut.sums[..., -1], axis=(1, 3)))[..., None]
    else:
        total = jnp.prod(cut.totals, axis=1)

    def over(state, piece):
        total, increment = piece
        return total[..., None] * state + increment, state

    by_piece = (jnp.moveaxis(x.reshape(B, pieces, *x.shape[1:]), 1, 0) for x in (total, increments))
    last, starts = lax.scan(over, start, tuple(by_piece), reverse=reverse, unroll=True)
    out, _, *kept = _walk(cut, jnp.moveaxis(starts, 0, 1).reshape(increments.shape), scale, reverse, every)
    return out.reshape(B, T, HV, V), last, *(x.reshape(B, N // every, *x.shape[2:]) for x in kept)


def _groups(V):
    """Warpgroups of a CTA with parts of a state."""
    return 2 if V % (2 * TILE) == 0 else 1


def _walk(operands, start, scale, reverse, every=0):
    """:func:`walk` without pieces; with neither ``a`` nor ``start``, nothing but the last state, from zero."""
    (B, T, HV, V), K = operands.y.shape, operands.b.shape[3]
    groups, N = _groups(V), T // CHUNK
    given = {name: x for name, x in operands._asdict().items() if x is not None}
    reads = "a" in given
    width = groups * TILE
    stages = dict(a=_tile(STAGES, CHUNK, K), b=_tile(STAGES, CHUNK, K), y=_tile(STAGES, CHUNK, width), pairs=_tile(STAGES, CHUNK, CHUNK))
    stages |= dict(sums=plgpu.SMEM((STAGES, 2, CHUNK), jnp.float32), totals=plgpu.SMEM((STAGES, K), jnp.float32))
    out_type = [jax.ShapeDtypeStruct(operands.y.shape, jnp.bfloat16)] * reads + [jax.ShapeDtypeStruct((B, HV, K, V), jnp.float32)]
    if every:
        out_type.append(jax.ShapeDtypeStruct((B, N // every, HV, K, V), jnp.bfloat16))
    return laid_out_kernel(
        _Walk(tuple(given), N, groups, scale, reverse, every).run,
        name=f"gated_linear_attention_{'walk' if reads else 'increments'}",
        out_type=tuple(out_type),
        scratch_types=[
            [stages[name] for name in given],
            [_tile(groups, CHUNK, TILE)] * (operands.sums is not None),
            [_tile(groups, CHUNK, TILE)] * reads,
            [_tile(groups, min(K // TILE, AT_ONCE), TILE, TILE)] * reads,
            plgpu.Barrier(num_arrivals=len(given), num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
        ],
        grid=(B, HV, V // width),
        grid_names=("b", "h", "columns"),
        num_threads=groups + 1,
        thread_name="warpgroup",
    )(*[start] * reads, *given.values())


def _tile(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED)


class _Walk(NamedTuple):
    """The kernel; names: of the operands that come chunk by chunk."""

    names: tuple[str, ...]
    N: int
    groups: int
    scale: float
    reverse: bool
    every: int

    def run(self, *refs):
        start_ref, *refs = refs if "a" in self.names else (None, *refs)
        sources, refs = refs[: len(self.names)], refs[len(self.names) :]
        *results, stages, weighed, out, tiles, full, free = refs
        w = lax.axis_index("warpgroup")
        buffers = [buffer.at[w] for some in (weighed, out, tiles) for buffer in some]
        pl.when(w == self.groups)(lambda: self._load(sources, stages, full, free))
        pl.when(w < self.groups)(lambda: self._compute(start_ref, results, stages, buffers, full, free))

    def _chunk(self, m):
        """The m-th of the walk."""
        return self.N - 1 - m if self.reverse else m

    def _load(self, sources, stages, full, free):
        if self.groups == 2:
            plgpu.set_max_registers(24, action="decrease")

        def fetch(m, _):
            b, h, columns = _place(self.groups * TILE)
            n, slot = self._chunk(m), lax.rem(m, jnp.int32(STAGES))
            tokens = pl.ds(n * CHUNK, CHUNK)
            pl.when(m >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
            for name, source, stage in zip(self.names, sources, stages, strict=True):
                where = dict(y=(b, tokens, h, columns), sums=(b, n, h), totals=(b, n, h))
                head = h // (lax.axis_size("h") // source.shape[2])
                plgpu.copy_gmem_to_smem(source.at[where.get(name, (b, tokens, head))], stage.at[slot], full.at[slot])

        lax.fori_loop(jnp.int32(0), jnp.int32(self.N), fetch, None)
        for m in range(max(self.N - STAGES, 0), self.N):
            plgpu.barrier_wait(free.at[m % STAGES])

    def _compute(self, start_ref, results, stages, buffers, full, free):
        last_ref = results["a" in self.names]
        if self.groups == 2:
            plgpu.set_max_registers(240, action="increase")

        def part(ref, k):
            b, h, columns = self._own_place()
            return ref.at[b, h, pl.ds(k * TILE, TILE), columns]

        def advance(m, state):
            n, slot = self._chunk(m), lax.rem(m, jnp.int32(STAGES))

            def keep(tiles, first):
                @pl.when(lax.rem(m, jnp.int32(self.every)) == 0)
                def _():
                    for k, tile in enumerate(tiles, first):
                        plgpu.copy_smem_to_gmem(tile, part(results[-1].at[:, n // self.every], k))

            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            chunk = Operands(**dict.fromkeys(("a", "b", "y")) | {name: x.at[slot] for name, x in zip(self.names, stages, strict=True)})
            chunk = chunk._replace(y=chunk.y.at[:, pl.ds(lax.axis_index("warpgroup") * TILE, TILE)])
            out, state = step(chunk, state, buffers, keep if self.every else None, scale=self.scale, reverse=self.reverse)
            plgpu.commit_smem()  # all this comes before what TMA, another proxy, reads or writes there next
            if out is not None:
                b, h, columns = self._own_place()
                plgpu.copy_smem_to_gmem(out, results[0].at[b, pl.ds(n * CHUNK, CHUNK), h, columns])
            plgpu.barrier_arrive(free.at[slot])
            return state

        def start(k):
            if start_ref is None:
                return plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), plgpu.Layout.WGMMA)
            return platforms.gpu_load(part(start_ref, k), layout=plgpu.Layout.WGMMA, optimized=False)

        # Accumulators from the start: inside ``shard_map`` an array from memory is of another type.
        state = [product(start=start(k)) for k in range(last_ref.shape[2] // TILE)]
        for k, x in enumerate(lax.fori_loop(jnp.int32(0), jnp.int32(self.N), advance, state)):
            part(last_ref, k)[...] = x
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _own_place(self):
        b, h, columns = _place(self.groups * TILE)
        return b, h, pl.ds(columns.start + lax.axis_index("warpgroup") * TILE, TILE)


def _place(width):
    """A CTA's batch row, head and columns of V."""
    b, h, block = (lax.axis_index(name) for name in ("b", "h", "columns"))
    return b, h, pl.ds(block * width, width)
