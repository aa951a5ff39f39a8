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

from pallas_kernels.gated_delta_rule.gpu_chunk import COLUMNS, call, product, tile
from pallas_kernels.gated_delta_rule.gpu_walk import load, parts


def starts(transitions, increments, start, backwards=False):
    """The turned states that the walks through the pieces start from, [B,HV,P,V,K] float32.

    transitions [B,HV,P,K,K] and increments [B,HV,P,V,K]: what walks from the identity and from zero come to, turned, float32; where
    ``backwards`` the increments are those of gradients. start: [B,HV,V,K], for the first piece, or backwards the last.
    """
    B, HV, P, V, K = increments.shape
    high, low = halves_by_xla(transitions)
    width = min(K, 128)
    shape = (width, K) if backwards else (K, width)
    (starts,) = call(
        partial(_kernel, backwards),
        *(high, low, increments, start),
        name="pieces",
        out_type=(jax.ShapeDtypeStruct(increments.shape, jnp.float32),),
        scratch_types=[tile(*shape), tile(*shape), plgpu.Barrier(num_arrivals=2)],
        grid=(B, HV, V // COLUMNS),
        grid_names=("b", "h", "columns"),
    )
    return starts


def halves_by_xla(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`_halves` by XLA, which takes a cast to bfloat16 and back for none, and so would leave nothing to the second."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _kernel(backwards, high_ref, low_ref, increments_ref, start_ref, result_ref, high, low, loaded):
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
        halves = [_halves(x) for x in state]
        following = load(increments_ref.at[b, h, p, columns])
        for i, part in enumerate(parts(result_ref)):
            block = (part, slice(None)) if backwards else (slice(None), part)
            for ref, buffer in ((high_ref, high), (low_ref, low)):
                plgpu.copy_gmem_to_smem(ref.at[b, h, p].at[block], buffer, loaded)
            plgpu.barrier_wait(loaded)
            products = []
            for (x, rest), rows in zip(halves, parts(result_ref), strict=True):
                M, M_rest = (y.at[:, rows].T if backwards else y.at[rows, :] for y in (high, low))
                products += [(x, M), (x, M_rest), (rest, M)]
            following[i] = product(*products, start=following[i])
        return following

    state = jax.lax.fori_loop(0, P - 1, step, load(start_ref.at[b, h, columns]))
    store(0 if backwards else P - 1, state)


def _halves(x):
    """Two bfloat16 arrays whose sum is the float32 ``x`` to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
