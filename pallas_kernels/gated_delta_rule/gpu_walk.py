"""A walk through the chunks of a sequence, forwards or backwards, by Mosaic GPU: the state in registers, the operands from memory.

The grid is (B, HV, pieces of the sequence, blocks of V). Of a CTA's warpgroups each has COLUMNS columns of the turned state, but for the
last one, which loads: chunk after chunk, as far ahead as there are buffers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, COLUMNS, WALKED, Gate, call, product, row_of, tile


class Keys(NamedTuple):
    """What the walks take for q, k, beta and the decays.

    With decays a head: q and k [B,T,H,K] as they are, and gates [B,HV,N,GATES,C], which hold all factors a token. With decays a channel
    such factors are in the arrays: in q and k [B,T,HV,K], as they read the state, in k as it is ``written`` to it, and in P; ``total``
    [B,HV,N,K] is the decay of a chunk.
    """

    k: jax.Array
    q: jax.Array | None
    gates: jax.Array | None = None
    written: jax.Array | None = None
    total: jax.Array | None = None

    def operands(self, **others: jax.Array) -> dict[str, jax.Array]:
        """By the names of :class:`Chunk`."""
        return {name: x for name, x in (self._asdict() | others).items() if x is not None}


class Chunk(NamedTuple):
    """A chunk in shared memory: what a walk reads of it, as in :class:`Keys`; None where it does not."""

    k: jax.Ref  # [C,K]
    inverse: jax.Ref  # [C,C]
    gates: jax.Ref | None = None  # [WALKED,C]
    written: jax.Ref | None = None
    total: jax.Ref | None = None  # [K]
    v: jax.Ref | None = None  # [C,COLUMNS of all warpgroups]; going backwards the gradient of o
    q: jax.Ref | None = None
    scores: jax.Ref | None = None

    def factor(self, gate: Gate, scale: float = 1.0) -> jax.Array | float:
        """``scale`` times the gate of token j in column j of [COLUMNS,C]; 1 where the arrays have both."""
        return 1.0 if self.gates is None else scale * row_of(self.gates, gate)

    @property
    def writes(self) -> jax.Ref:
        return self.k if self.written is None else self.written

    @property
    def decay(self) -> jax.Array:
        """Of the state: a number, or [COLUMNS,K]."""
        if self.total is None:
            return self.gates[Gate.SINCE_START, CHUNK - 1]
        total = plgpu.layout_cast(self.total[...], plgpu.Layout.WGMMA.reduce(0))
        return jax.lax.broadcast_in_dim(total, (COLUMNS, *total.shape), [1])


class Place(NamedTuple):
    """Where a warpgroup is: its row, head, chunk; its tokens and its columns of V; and its own among those of its CTA."""

    b: jax.Array
    h: jax.Array
    n: jax.Array
    tokens: pl.Slice
    columns: pl.Slice
    own: pl.Slice


def walk(plan, name, step, out_type, buffers, operands, states, backwards=False):
    """``step(plan, place, chunk, state, own buffers, *result refs)`` for every chunk -> its results.

    operands: by the names of :class:`Chunk`. states: [B,HV,pieces,V,K] float32, before each piece; a last result of their shape is the
    states after it.
    """
    B, HV, N = operands["inverse"].shape[:3]
    V, K = states.shape[3:]
    width = plan.warpgroups * COLUMNS
    keys, square = tile(plan.stages, CHUNK, K), tile(plan.stages, CHUNK, CHUNK)
    kinds = dict(k=keys, q=keys, written=keys, v=tile(plan.stages, CHUNK, width), inverse=square, scores=square)
    kinds |= {name: plgpu.SMEM((plan.stages, *shape), jnp.float32) for name, shape in (("gates", (WALKED, CHUNK)), ("total", (K,)))}
    stages = [kinds[name] for name in operands]
    groups = HV // operands["k"].shape[2]
    return call(
        _Walk(plan, tuple(operands), groups, N, backwards, step).run,
        states,
        *operands.values(),
        name=name,
        out_type=out_type,
        scratch_types=[
            stages,
            buffers,
            plgpu.Barrier(num_arrivals=len(operands), num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        ],
        grid=(B, HV, states.shape[2], V // width),
        grid_names=("b", "h", "piece", "columns"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
    )


class _Walk(NamedTuple):
    """A kernel; names: of the operands that come chunk by chunk; groups: value heads to a head of keys."""

    plan: NamedTuple
    names: tuple[str, ...]
    groups: int
    N: int
    backwards: bool
    step: Callable

    def run(self, states_ref, *refs):
        sources, refs = refs[: len(self.names)], refs[len(self.names) :]
        *results, stages, buffers, loaded, free = refs
        w = jax.lax.axis_index("warpgroup")
        pl.when(w == self.plan.warpgroups)(lambda: self._load(sources, stages, loaded, free))
        pl.when(w < self.plan.warpgroups)(lambda: self._compute(states_ref, results, stages, [x.at[w] for x in buffers], loaded, free))

    def _place(self, m) -> Place:
        """Of the m-th chunk of the walk."""
        b, h, u = (platforms.gpu_index(name) for name in ("b", "h", "columns"))
        w = jax.lax.axis_index("warpgroup")
        first, count = self._chunks()
        n = first + (count - 1 - m if self.backwards else m)
        start = u * self.plan.warpgroups * COLUMNS
        return Place(b, h, n, pl.ds(n * CHUNK, CHUNK), pl.ds(start + w * COLUMNS, COLUMNS), pl.ds(w * COLUMNS, COLUMNS))

    def _chunks(self):
        """The first chunk of the piece, and how many it has."""
        first = platforms.gpu_index("piece") * self.plan.chunks
        return first, jnp.minimum(self.plan.chunks, self.N - first)

    def _load(self, sources, stages, loaded, free):
        plan, (_, count), u = self.plan, self._chunks(), platforms.gpu_index("columns")
        if plan.warpgroups == 2:
            plgpu.set_max_registers(24, action="decrease")

        @pl.loop(0, count)
        def _(m):
            at, slot = self._place(m), jax.lax.rem(m, plan.stages)
            keys = at.b, at.tokens, at.h // self.groups
            values = at.b, at.tokens, at.h, pl.ds(u * plan.warpgroups * COLUMNS, plan.warpgroups * COLUMNS)
            gates = at.b, at.h, at.n, pl.ds(0, WALKED)
            where = dict(k=keys, q=keys, written=keys, v=values, gates=gates)
            pl.when(m >= plan.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for name, source, stage in zip(self.names, sources, stages, strict=True):
                source = source.at[where.get(name, (at.b, at.h, at.n))]
                plgpu.copy_gmem_to_smem(source, stage.at[slot], loaded.at[slot])

        @pl.loop(jnp.maximum(count - plan.stages, 0), count)
        def _(m):
            plgpu.barrier_wait(free.at[jax.lax.rem(m, plan.stages)])

    def _compute(self, states_ref, results, stages, buffers, loaded, free):
        plan, (_, count), piece = self.plan, self._chunks(), platforms.gpu_index("piece")
        if plan.warpgroups == 2:
            plgpu.set_max_registers(240, action="increase")

        def step(m, state):
            slot = jax.lax.rem(m, plan.stages)
            plgpu.barrier_wait(loaded.at[slot])
            chunk = Chunk(**{name: stage.at[slot] for name, stage in zip(self.names, stages, strict=True)})
            state = self.step(plan, self._place(m), chunk, state, buffers, *results)
            plgpu.commit_smem()  # what was read here comes before what TMA, another proxy, writes there next
            plgpu.barrier_arrive(free.at[slot])
            return state

        at = self._place(0)
        before, after = (ref.at[at.b, at.h, piece, at.columns] for ref in (states_ref, results[-1]))
        state = jax.lax.fori_loop(0, count, step, load(before))
        for x, part in zip(state, parts(after), strict=True):
            after[:, part] = x
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def parts(ref) -> list[pl.Slice]:
    """The last axis in slices of at most 128: a state's accumulators."""
    K = ref.shape[-1]
    return [pl.ds(start, min(K, 128)) for start in range(0, K, 128)]


def load(ref) -> list[jax.Array]:
    """A state from memory, in accumulators from the start: inside ``shard_map`` other arrays are of another type."""
    read = partial(platforms.gpu_load, layout=plgpu.Layout.WGMMA, optimized=False)
    return [product(start=read(ref.at[:, part])) for part in parts(ref)]


def read(state, *keys):
    """(x S)^T [COLUMNS,C] float32 for each x [C,K] of ``keys``."""

    # Of a state that nearly fills the registers, a rounded copy of a quarter at a time.
    width = 64 if len(state) > 1 else state[0].shape[1]

    def run(*sums):
        for i, x in enumerate(state):
            for start in range(0, x.shape[1], width):
                part = x[:, start : start + width].astype(jnp.bfloat16)
                for total, key in zip(sums, keys, strict=True):
                    plgpu.wgmma(total, part, key.at[:, pl.ds(i * x.shape[1] + start, width)].T)
                if len(state) > 1:
                    plgpu.wgmma_wait(0)
        return [total[...] for total in sums]

    return pl.run_scoped(run, *[plgpu.ACC((COLUMNS, CHUNK), jnp.float32)] * len(keys))


def write(state, ref):
    """The state to shared memory, in bfloat16."""
    # Behind a barrier, or the compiler keeps a whole rounded copy of the state for the products too.
    for x, part in zip(jax.lax.optimization_barrier(state), parts(ref), strict=True):
        ref[:, part] = x.astype(jnp.bfloat16)


def advance(state, decay, *writes):
    """decay S^T plus the sum of x y over ``writes``, x [COLUMNS,C] in registers or shared memory, y [C,K].

    decay: a number, or of a state in one part an array of its shape.
    """

    def run(*totals):
        for total, x in zip(totals, state, strict=True):
            total[...] = x * decay
        for x, y in writes:
            for total, part in zip(totals, parts(y), strict=True):
                plgpu.wgmma(total, x, y.at[:, part])
        return [total[...] for total in totals]

    return pl.run_scoped(run, *[plgpu.ACC(x.shape, jnp.float32) for x in state])
