"""A walk through the chunks of a sequence, forwards or backwards, by Mosaic GPU: the state in registers, the operands from memory.

Forwards it takes q, k and v and gives o; backwards, with the state's gradient, k, q and the gradient of o, and gives that of v. What it
does with a chunk is :mod:`.gpu_step`. The grid is (B, HV, pieces of the sequence, blocks of V). Of a CTA's warpgroups each has TILE columns
of the state, but for the last one, which loads, chunk after chunk, as far ahead as there are buffers.

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
MULTIPROCESSORS = 132  # of an H100 or H200, with a CTA of two warpgroups each
LEAST = 8  # chunks a piece


class Plan(NamedTuple):
    """pieces of the sequence, so many chunks each, the last one maybe fewer; groups: warpgroups of a CTA with parts of a state."""

    pieces: int
    chunks: int
    groups: int

    @classmethod
    def of(cls, walks: int, N: int, every: int, even: bool) -> "Plan":
        """For so many ``walks`` of a warpgroup through all N chunks, a multiple of ``every``, as those of a piece are to be; ``even`` where
        a head has two or four."""
        pieces = min(2 * MULTIPROCESSORS // walks, N // LEAST)
        pieces = pieces if pieces > 2 else 1  # two would gain nothing: what comes first takes as long as what they save
        chunks = -(-N // (pieces * every)) * every
        pieces = -(-N // chunks)
        return cls(pieces, chunks, groups=2 if even and walks * pieces > MULTIPROCESSORS else 1)


def walk(operands: Operands, start, *, scale: float = 1.0, reverse: bool = False, every: int = 0):
    """From the state ``start`` [B,HV,K,V] in float32, before the first chunk or with ``reverse`` after the last.

    operands: as there, of the whole sequence: a, b [B,T,H,K], y [B,T,HV,V], T of N whole chunks, and either sums [B,N,HV,2,C] or
    pairs [B,T,HV,C] and totals [B,N,HV,K].

    Returns out [B,T,HV,V] in bfloat16, the state at the other end in float32, and where ``every`` is not 0 those at every so many chunks
    [B,N/every,HV,K,V] in bfloat16: each before, or with ``reverse`` after, so many chunks.
    """
    B, T, HV, V = operands.y.shape
    N = T // CHUNK
    plan = Plan.of(B * HV * V // TILE, N, max(every, 1), even=V % (2 * TILE) == 0)
    if plan.pieces == 1:
        out, last, *kept = _walk(plan, operands, start[:, None], scale, reverse, every)
        return out, last[:, 0], *kept

    (increments,) = _walk(plan, operands._replace(a=None, pairs=None), None, scale, reverse)

    def by_pieces(x, nothing):
        x = jnp.pad(x, [(0, 0), (0, plan.pieces * plan.chunks - N), (0, 0), (0, 0)], constant_values=nothing)
        return x.reshape(B, plan.pieces, plan.chunks, *x.shape[2:])

    if operands.totals is None:
        total = jnp.exp(jnp.sum(by_pieces(operands.sums[..., -1], 0), axis=(2, 4)))[..., None]
    else:
        total = jnp.prod(by_pieces(operands.totals, 1), axis=2)

    def over(state, piece):
        total, increment = piece
        return total[..., None] * state + increment, state

    by_piece = tuple(jnp.moveaxis(x, 1, 0) for x in (total, increments))
    last, starts = lax.scan(over, start, by_piece, reverse=reverse, unroll=True)
    out, _, *kept = _walk(plan, operands, jnp.moveaxis(starts, 0, 1), scale, reverse, every)
    return out, last, *kept


def _walk(plan, operands, start, scale, reverse, every=0):
    """:func:`walk` for all pieces at once, ``start`` and the last state [B,pieces,HV,K,V] of each; with neither ``a`` nor ``start``,
    nothing but the last states, from zero."""
    (B, T, HV, V), K = operands.y.shape, operands.b.shape[3]
    groups, N = plan.groups, T // CHUNK
    given = {name: x for name, x in operands._asdict().items() if x is not None}
    reads = "a" in given
    width = groups * TILE
    stages = dict(a=_tile(STAGES, CHUNK, K), b=_tile(STAGES, CHUNK, K), y=_tile(STAGES, CHUNK, width), pairs=_tile(STAGES, CHUNK, CHUNK))
    stages |= dict(sums=plgpu.SMEM((STAGES, 2, CHUNK), jnp.float32), totals=plgpu.SMEM((STAGES, K), jnp.float32))
    out_type = [jax.ShapeDtypeStruct(operands.y.shape, jnp.bfloat16)] * reads
    out_type.append(jax.ShapeDtypeStruct((B, plan.pieces, HV, K, V), jnp.float32))
    if every:
        out_type.append(jax.ShapeDtypeStruct((B, N // every, HV, K, V), jnp.bfloat16))
    return laid_out_kernel(
        _Walk(tuple(given), N, plan, scale, reverse, every).run,
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
        grid=(B, HV, plan.pieces, V // width),
        grid_names=("b", "h", "piece", "columns"),
        num_threads=groups + 1,
        thread_name="warpgroup",
    )(*[start] * reads, *given.values())


def _tile(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED)


class _Walk(NamedTuple):
    """The kernel; names: of the operands that come chunk by chunk."""

    names: tuple[str, ...]
    N: int
    plan: Plan
    scale: float
    reverse: bool
    every: int

    def run(self, *refs):
        start_ref, *refs = refs if "a" in self.names else (None, *refs)
        sources, refs = refs[: len(self.names)], refs[len(self.names) :]
        *results, stages, weighed, out, tiles, full, free = refs
        w = lax.axis_index("warpgroup")
        buffers = [buffer.at[w] for some in (weighed, out, tiles) for buffer in some]
        pl.when(w == self.plan.groups)(lambda: self._load(sources, stages, full, free))
        pl.when(w < self.plan.groups)(lambda: self._compute(start_ref, results, stages, buffers, full, free))

    def _chunks(self):
        """The first chunk of the piece, and how many it has."""
        chunks, piece = self.plan.chunks, platforms.gpu_index("piece")
        return piece * chunks, jnp.int32(chunks) if self.N % chunks == 0 else jnp.minimum(chunks, self.N - piece * chunks)

    def _chunk(self, m):
        """The m-th of the walk."""
        first, count = self._chunks()
        return first + (count - 1 - m if self.reverse else m)

    def _load(self, sources, stages, full, free):
        if self.plan.groups == 2:
            plgpu.set_max_registers(24, action="decrease")

        def fetch(m, _):
            b, h, columns = _place(self.plan.groups * TILE)
            n, slot = self._chunk(m), lax.rem(m, jnp.int32(STAGES))
            tokens = pl.ds(n * CHUNK, CHUNK)
            pl.when(m >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
            for name, source, stage in zip(self.names, sources, stages, strict=True):
                where = dict(y=(b, tokens, h, columns), sums=(b, n, h), totals=(b, n, h))
                head = h // (platforms.gpu_size("h") // source.shape[2])
                plgpu.copy_gmem_to_smem(source.at[where.get(name, (b, tokens, head))], stage.at[slot], full.at[slot])

        _, count = self._chunks()
        lax.fori_loop(jnp.int32(0), count, fetch, None)

        @pl.loop(jnp.maximum(count - STAGES, 0), count)
        def _(m):
            plgpu.barrier_wait(free.at[lax.rem(m, jnp.int32(STAGES))])

    def _compute(self, start_ref, results, stages, buffers, full, free):
        last_ref = results["a" in self.names]
        if self.plan.groups == 2:
            plgpu.set_max_registers(240, action="increase")

        def part(ref, n, k):
            b, h, columns = self._own_place()
            return ref.at[b, n, h, pl.ds(k * TILE, TILE), columns]

        def advance(m, state):
            n, slot = self._chunk(m), lax.rem(m, jnp.int32(STAGES))

            def keep(tiles, first):
                @pl.when(lax.rem(m, jnp.int32(self.every)) == 0)
                def _():
                    for k, tile in enumerate(tiles, first):
                        plgpu.copy_smem_to_gmem(tile, part(results[-1], n // self.every, k))

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
            return platforms.gpu_load(part(start_ref, platforms.gpu_index("piece"), k), layout=plgpu.Layout.WGMMA, optimized=False)

        # Accumulators from the start: inside ``shard_map`` an array from memory is of another type.
        state = [product(start=start(k)) for k in range(last_ref.shape[3] // TILE)]
        _, count = self._chunks()
        for k, x in enumerate(lax.fori_loop(jnp.int32(0), count, advance, state)):
            part(last_ref, platforms.gpu_index("piece"), k)[...] = x
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _own_place(self):
        b, h, columns = _place(self.plan.groups * TILE)
        return b, h, pl.ds(columns.start + lax.axis_index("warpgroup") * TILE, TILE)


def _place(width):
    """A CTA's batch row, head and columns of V."""
    b, h, block = (platforms.gpu_index(name) for name in ("b", "h", "columns"))
    return b, h, pl.ds(block * width, width)
