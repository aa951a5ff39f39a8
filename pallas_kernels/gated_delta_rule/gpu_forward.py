"""The Mosaic GPU kernel that takes the states through the chunks, in order: for outputs, or for what the backward pass needs of them.

A warpgroup has COLUMNS columns of a head's state [K,V], turned, in the accumulators of its tensor cores: S^T [COLUMNS,K]. With X and P of
:mod:`.gpu_pairs` a chunk that starts from S is

    e = X v - X (exp(c) k S)        o = scale exp(c) q S + P beta e      S' = exp(c_C) S + (exp(c_C - c) k)^T beta e

all of them turned too: so every left operand with a factor a token (S, exp(c) k S, e) is the result of the product before it and stays in
registers, and q, k, v, X and P go from memory to the tensor cores as they are. That is for decays a head or none; where they are one a
channel, q, k and P come with all factors in them (:class:`.gpu_walk.Keys`), and the state's own decay is a row.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta_rule import gpu_walk
from pallas_kernels.gated_delta_rule.gpu_chunk import CHUNK, COLUMNS, Gate, product, tile


def outputs(plan, keys, v, inverse, scores, states):
    """keys: :class:`.gpu_walk.Keys`; v [B,T,HV,V], X and P [B,HV,N,C,C], states [B,HV,pieces,V,K] before each piece, float32.

    Returns (o [B,T,HV,V], the states after each piece).
    """
    out_type = _like(v), _like(states)
    buffers = [tile(plan.warpgroups, CHUNK, COLUMNS)]
    operands = keys.operands(v=v, inverse=inverse, scores=scores)
    return gpu_walk.walk(plan, "outputs", _outputs, out_type, buffers, operands, states)


def states(plan, keys, v, inverse, states):
    """The same without q and P.

    Returns (the states before each chunk [B,HV,N,V,K] and e [B,HV,N,V,C], both turned, in bfloat16, the states after each piece).
    """
    (B, HV, N), K, V = inverse.shape[:3], keys.k.shape[3], v.shape[3]
    kept = [jax.ShapeDtypeStruct((B, HV, N, V, size), v.dtype) for size in (K, CHUNK)]
    out_type = (*kept, _like(states))
    plan = plan.keeping(K)
    buffers = [tile(plan.warpgroups, COLUMNS, K), tile(plan.warpgroups, COLUMNS, CHUNK)]
    operands = keys._replace(q=None).operands(v=v, inverse=inverse)
    return gpu_walk.walk(plan, "states", _states, out_type, buffers, operands, states)


def increments(plan, keys, v, inverse, states):
    """The same -> the states after each piece alone."""
    operands = keys._replace(q=None).operands(v=v, inverse=inverse)
    (after,) = gpu_walk.walk(plan, "increments", _increments, (_like(states),), [], operands, states)
    return after


def transitions(plan, keys, inverse, states):
    """The same without values, states [B,HV,pieces,K,K]."""
    plan = plan._replace(warpgroups=min(plan.warpgroups, keys.k.shape[3] // COLUMNS))
    operands = keys._replace(q=None).operands(inverse=inverse)
    (after,) = gpu_walk.walk(plan, "transitions", _increments, (_like(states),), [], operands, states)
    return after


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _outputs(plan, at, chunk, state, buffers, o_ref, _):
    met, found = gpu_walk.read(state, chunk.k, chunk.q)
    errors = _errors(chunk, at, met)
    updates = errors * chunk.factor(Gate.BETA)
    output = product((updates.astype(jnp.bfloat16), chunk.scores.T), start=found * chunk.factor(Gate.SINCE_START, plan.scale))
    state = _next(chunk, state, updates)
    (o,) = buffers
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    o.T[...] = plgpu.layout_cast(output.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o, o_ref.at[at.b, at.tokens, at.h, at.columns])
    return state


def _states(plan, at, chunk, state, buffers, states_ref, errors_ref, _):
    (met,) = gpu_walk.read(state, chunk.k)
    states, kept = buffers
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    gpu_walk.write(state, states)
    errors = _errors(chunk, at, met)
    kept[...] = errors.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(states, states_ref.at[at.b, at.h, at.n, at.columns])
    plgpu.copy_smem_to_gmem(kept, errors_ref.at[at.b, at.h, at.n, at.columns])
    return _next(chunk, state, errors * chunk.factor(Gate.BETA))


def _increments(plan, at, chunk, state, buffers, _):
    (met,) = gpu_walk.read(state, chunk.k)
    return _next(chunk, state, _errors(chunk, at, met) * chunk.factor(Gate.BETA))


def _errors(chunk, at, met):
    """e^T [COLUMNS,C] of (k S)^T."""
    met = (met * -chunk.factor(Gate.SINCE_START)).astype(jnp.bfloat16)
    of_values = [] if chunk.v is None else [(chunk.v.at[:, at.own].T, chunk.inverse.T)]
    return product(*of_values, (met, chunk.inverse.T))


def _next(chunk, state, updates):
    writes = updates * chunk.factor(Gate.UNTIL_END)
    return gpu_walk.advance(state, chunk.decay, (writes.astype(jnp.bfloat16), chunk.writes))
