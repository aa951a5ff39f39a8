"""The Mosaic GPU kernel that takes the states' gradients through the chunks, from the last to the first.

With D the gradients and all else as in :mod:`.gpu_forward`,

    D e = beta (P^T D o + exp(c_C - c) k D S')        D v = X^T D e        D S = exp(c_C) D S' + (scale exp(c) q)^T D o - (exp(c) k)^T D v

turned as there. D o with its factors a token is not the result of a product: it is rounded once more and lies in shared memory. Where q
has these factors in it, for decays a channel, D o is an operand as it is.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta_rule import gpu_walk
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, COLUMNS, Gate, column_of, product, tile


def states(plan, keys, inverse, scores, d_o, d_states):
    """Arrays as in ``gpu_forward.outputs``, d_states after each piece.

    Returns (D v [B,T,HV,V], D S' after each chunk, [B,HV,N,V,K], turned, in bfloat16, and D S before each piece).
    """
    (B, HV, N), K, V = inverse.shape[:3], keys.k.shape[3], d_o.shape[3]
    out_type = (
        jax.ShapeDtypeStruct(d_o.shape, d_o.dtype),
        jax.ShapeDtypeStruct((B, HV, N, V, K), d_o.dtype),
        jax.ShapeDtypeStruct(d_states.shape, d_states.dtype),
    )
    plan = plan.keeping(K)
    buffers = [tile(plan.warpgroups, COLUMNS, K), tile(plan.warpgroups, CHUNK, COLUMNS), *_for_reads(plan, keys)]
    operands = keys.operands(v=d_o, inverse=inverse, scores=scores)
    return gpu_walk.walk(plan, "backward", _states, out_type, buffers, operands, d_states, backwards=True)


def increments(plan, keys, inverse, scores, d_o, d_states):
    """The same -> D S before each piece alone."""
    buffers = _for_reads(plan, keys)
    operands = keys.operands(v=d_o, inverse=inverse, scores=scores)
    out_type = jax.ShapeDtypeStruct(d_states.shape, d_states.dtype)
    (before,) = gpu_walk.walk(plan, "backward_increments", _increments, (out_type,), buffers, operands, d_states, backwards=True)
    return before


def _for_reads(plan, keys):
    return [tile(plan.warpgroups, CHUNK, COLUMNS)] if keys.total is None else []


def _states(plan, at, chunk, d_state, buffers, d_v_ref, d_states_ref, _):
    after, d_v, *buffer = buffers
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    gpu_walk.write(d_state, after)
    reads = _reads(plan, at, chunk, *buffer)
    d_values = _d_values(at, chunk, d_state)
    d_v.T[...] = plgpu.layout_cast(d_values.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(d_v, d_v_ref.at[at.b, at.tokens, at.h, at.columns])
    plgpu.copy_smem_to_gmem(after, d_states_ref.at[at.b, at.h, at.n, at.columns])
    return _before(chunk, d_state, d_values, reads)


def _increments(plan, at, chunk, d_state, buffers, _):
    reads = _reads(plan, at, chunk, *buffers)
    d_values = _d_values(at, chunk, d_state)
    plgpu.commit_smem()
    return _before(chunk, d_state, d_values, reads)


def _reads(plan, at, chunk, buffer=None):
    """D o [C,COLUMNS] with what q lacks of its factors, in the ``buffer``; as it is where q lacks none."""
    d_o = chunk.v.at[:, at.own]
    if chunk.gates is None:
        return d_o
    since_start = column_of(chunk.gates, Gate.SINCE_START, COLUMNS)
    d_output = plgpu.layout_cast(d_o[...], plgpu.Layout.WGMMA).astype(jnp.float32)
    buffer[...] = (d_output * (plan.scale * since_start)).astype(jnp.bfloat16)
    return buffer


def _d_values(at, chunk, d_state):
    """(D v)^T [COLUMNS,C]."""
    (met,) = gpu_walk.read(d_state, chunk.writes)
    d_updates = product((chunk.v.at[:, at.own].T, chunk.scores), start=met * chunk.factor(Gate.UNTIL_END))
    d_errors = d_updates * chunk.factor(Gate.BETA)
    return product((d_errors.astype(jnp.bfloat16), chunk.inverse))


def _before(chunk, d_state, d_values, reads):
    d_met = (d_values * -chunk.factor(Gate.SINCE_START)).astype(jnp.bfloat16)
    return gpu_walk.advance(d_state, chunk.decay, (d_met, chunk.k), (reads.T, chunk.q))
