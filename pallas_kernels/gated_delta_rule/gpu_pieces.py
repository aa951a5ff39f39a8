"""The states before each piece of a sequence, by Mosaic GPU: pieces are walked side by side where the batch leaves multiprocessors idle.

The state after a piece is M S + Z: M, the piece's transition, is the state it comes to from the identity without values, and Z the one from
zero. The gradients go through the pieces from the last to the first, by M^T. Here 2 K V FLOPs and 4 K V bytes a piece and key are too few
to matter, but not to be rounded: factors have two parts in bfloat16.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta_rule.gpu_chunk import COLUMNS, call, tile
from pallas_kernels.gated_delta_rule.gpu_walk import load, parts

BLOCK = 64  # keys of a product


def starts(transitions, increments, start, backwards=False):
    """The turned states that the walks through the pieces start from, [B,HV,P,V,K] float32.

    transitions [B,HV,P,K,K] and increments [B,HV,P,V,K]: what walks from the identity and from zero come to, turned, float32; where
    ``backwards`` the increments are those of gradients. start: [B,HV,V,K], for the first piece, or backwards the last.
    """
    B, HV, P, V, K = increments.shape
    high, low = halves_by_xla(transitions)
    width = min(K, 128)
    block = (width, BLOCK) if backwards else (BLOCK, width)
    (starts,) = call(
        partial(_kernel, backwards),
        *(high, low, increments, start),
        name="pieces",
        out_type=(jax.ShapeDtypeStruct(increments.shape, jnp.float32),),
        scratch_types=[
            tile(2, K // BLOCK, COLUMNS, BLOCK),
            tile(2, K // BLOCK, *block),
            plgpu.Barrier(num_arrivals=2 * K // BLOCK),
        ],
        grid=(B, HV, V // COLUMNS),
        grid_names=("b", "h", "columns"),
    )
    return starts


def halves_by_xla(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`_halves` by XLA, which takes a cast to bfloat16 and back for none, and so would leave nothing to the second."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _kernel(backwards, high_ref, low_ref, increments_ref, start_ref, result_ref, states, transitions, loaded):
    b, h, u = (jax.lax.axis_index(name) for name in ("b", "h", "columns"))
    P = result_ref.shape[2]
    columns = pl.ds(u * COLUMNS, COLUMNS)

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
        for i, part in enumerate(parts(result_ref)):
            for half, ref in enumerate((high_ref, low_ref)):
                for n in range(states.shape[1]):
                    keys = pl.ds(n * BLOCK, BLOCK)
                    source = ref.at[b, h, p].at[(part, keys) if backwards else (keys, part)]
                    plgpu.copy_gmem_to_smem(source, transitions.at[half, n], loaded)
            plgpu.barrier_wait(loaded)
            following[i] = _product_of_halves(states, transitions, backwards, following[i])
        return following

    state = jax.lax.fori_loop(0, P - 1, step, load(start_ref.at[b, h, columns]))
    store(0 if backwards else P - 1, state)


def _product_of_halves(states, transitions, turned, start):
    """``start`` and the products of the factors' halves, [2, blocks of keys, ...] in shared memory, but that of the second ones."""
    blocks = states.shape[1]

    def run(total):
        total[...] = start

        # Unrolled, it would keep so many descriptors of operands from one piece to the next that they spill.
        @pl.loop(0, 3 * blocks)
        def _(m):
            halves, n = m // blocks, m % blocks
            y = transitions.at[halves % 2, n]
            plgpu.wgmma(total, states.at[halves // 2, n], y.T if turned else y)
            plgpu.wgmma_wait(0)

        return total[...]

    return pl.run_scoped(run, plgpu.ACC(start.shape, jnp.float32))


def _halves(x):
    """Two bfloat16 arrays whose sum is the float32 ``x`` to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
