"""The states before each piece of a sequence, by Mosaic GPU: pieces are walked side by side where the batch leaves multiprocessors idle.

The state after a piece is M S + Z: M, the piece's transition, is the state it comes to from the identity without values, and Z the one from
zero. The gradients go through the pieces from the last to the first, by M^T. What is rounded here is rounded once a piece: factors have two
parts in bfloat16. Few multiprocessors have anything to do meanwhile, so transitions are on their way before their turn.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platforms
from pallas_kernels.gated_delta_rule.gpu_chunk import COLUMNS, call, tile
from pallas_kernels.gated_delta_rule.gpu_walk import load, parts

BLOCK = 64  # keys of a product
STAGES = 4  # blocks in shared memory at a time


def starts(transitions, increments, start, backwards=False):
    """The turned states that the walks through the pieces start from, [B,HV,P,V,K] float32.

    transitions [B,HV,P,K,K] and increments [B,HV,P,V,K]: what walks from the identity and from zero come to, turned, float32; where
    ``backwards`` the increments are those of gradients. start: [B,HV,V,K], for the first piece, or backwards the last.
    """
    B, HV, P, V, K = increments.shape
    high, low = halves_by_xla(transitions)
    width = min(K, 128)
    (starts,) = call(
        partial(_kernel, backwards),
        *(high, low, increments, start),
        name="pieces",
        out_type=(jax.ShapeDtypeStruct(increments.shape, jnp.float32),),
        scratch_types=[
            tile(2, K // BLOCK, COLUMNS, BLOCK),
            tile(STAGES, 2, *((width, BLOCK) if backwards else (BLOCK, width))),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(B, HV, V // COLUMNS),
        grid_names=("b", "h", "columns"),
    )
    return starts


def halves_by_xla(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`_halves` by XLA, which takes a cast to bfloat16 and back for none, and so would leave nothing to the second."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


class _Transitions(NamedTuple):
    """Those of a head's pieces, but for the last, in blocks of BLOCK keys, numbered as they are used: STAGES of them are on their way.

    halves: high and low, [P,K,K] each; buffers: [STAGES,2,...]. A transition has its columns in ``parts``, each in ``blocks``.
    """

    halves: tuple[jax.Ref, jax.Ref]
    buffers: jax.Ref
    loaded: jax.Ref
    backwards: bool

    @property
    def parts(self) -> list[pl.Slice]:
        return parts(self.halves[0])

    @property
    def blocks(self) -> int:
        return self.halves[0].shape[-1] // BLOCK

    @property
    def total(self) -> int:
        return (self.halves[0].shape[0] - 1) * len(self.parts) * self.blocks

    def fetch(self, number) -> None:
        P, count, width = self.halves[0].shape[0], len(self.parts), self.parts[0].size
        m, i, n = number // (count * self.blocks), number // self.blocks % count, number % self.blocks
        part, keys = pl.ds(i * width, width), pl.ds(n * BLOCK, BLOCK)
        slot = number % STAGES
        for half, ref in enumerate(self.halves):
            source = ref.at[P - 1 - m].at[part, keys] if self.backwards else ref.at[m].at[keys, part]
            plgpu.copy_gmem_to_smem(source, self.buffers.at[slot, half], self.loaded.at[slot])

    def product(self, states, first, start):
        """``start`` and a state's halves, [2,blocks,...] in shared memory, times a part from its block ``first`` on; not low times low."""

        def run(total):
            total[...] = start

            # Unrolled, it would keep so many descriptors of operands from one piece to the next that they spill.
            @pl.loop(0, self.blocks)
            def _(n):
                slot, ahead = (first + n) % STAGES, first + n + STAGES
                plgpu.barrier_wait(self.loaded.at[slot])
                y, y_rest = (self.buffers.at[slot, half].T if self.backwards else self.buffers.at[slot, half] for half in (0, 1))
                x, x_rest = states.at[0, n], states.at[1, n]
                for left, right in ((x, y), (x, y_rest), (x_rest, y)):
                    plgpu.wgmma(total, left, right)
                plgpu.wgmma_wait(0)
                pl.when(ahead < self.total)(lambda: self.fetch(ahead))

            return total[...]

        return pl.run_scoped(run, plgpu.ACC(start.shape, jnp.float32))


def _kernel(backwards, high_ref, low_ref, increments_ref, start_ref, result_ref, states, buffers, loaded):
    b, h, u = (platforms.gpu_index(name) for name in ("b", "h", "columns"))
    columns, P = pl.ds(u * COLUMNS, COLUMNS), result_ref.shape[2]
    transitions = _Transitions((high_ref.at[b, h], low_ref.at[b, h]), buffers, loaded, backwards)

    def store(p, state):
        ref = result_ref.at[b, h, p, columns]
        for x, part in zip(state, parts(ref), strict=True):
            ref[:, part] = x

    def step(m, state):
        p = P - 1 - m if backwards else m
        store(p, state)
        # Through shared memory to the products: a state of 256 keys and its halves do not fit into the registers.
        for n, block in enumerate(x[:, start : start + BLOCK] for x in state for start in range(0, x.shape[1], BLOCK)):
            states[0, n], states[1, n] = _halves(block)
        plgpu.commit_smem()
        following = load(increments_ref.at[b, h, p, columns])
        first = m * len(following) * transitions.blocks
        return [transitions.product(states, first + i * transitions.blocks, x) for i, x in enumerate(following)]

    for number in range(min(STAGES, transitions.total)):
        transitions.fetch(number)
    state = jax.lax.fori_loop(0, P - 1, step, load(start_ref.at[b, h, columns]))
    store(0 if backwards else P - 1, state)


def _halves(x):
    """Two bfloat16 arrays whose sum is the float32 ``x`` to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
