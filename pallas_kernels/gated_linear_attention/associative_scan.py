"""Chunked gated linear attention with all chunks side by side, their states combined by an associative scan.

Two chunks in a row, S -> t1 S + U1 and then S -> t2 S + U2, act as S -> (t2 t1) S + (t2 U1 + U2): log2(N) wide steps in place
of N. The same pair is what a device that holds a part of a sequence has to tell those that hold the following parts.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention import chunk, xla
from pallas_kernels.segments import Segments


def gated_linear_attention(q, k, v, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in v's dtype, the final state [B,HV,K,V])."""
    inputs = q, k, v, log_decay
    length = xla.chunk_length(inputs)
    return xla.run(xla.Plan(scale, length, -(-q.shape[1] // length), combine), inputs, initial_state, segments)


def then(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The total decay [...,K|1] and increment [...,K,V] of two stretches of tokens in a row."""
    return first[0] * second[0], chunk.decayed(second[0], first[1]) + second[1]


def combine(total, increments, state):
    """As :data:`.chunk.Combine`."""
    total = jnp.broadcast_to(total, (*increments.shape[:3], *total.shape[3:]))
    total, increments = jax.lax.associative_scan(then, (total, increments), axis=2)
    after = chunk.decayed(total, state[:, :, None]) + increments
    return jnp.concatenate([state[:, :, None], after[:, :, :-1]], axis=2), after[:, :, -1]
