"""The chunked gated delta rule with its chunks combined by an associative scan: log2(N) steps instead of N.

A chunk acts on the state as S' = M S + N, with a transition M [K,K] and an increment N [K,V] that do not depend on S:

    M = diag(E_C0) - writes^T (I + A)^-1 reads_k        N = writes^T (I + A)^-1 beta V

Two chunks in a row act as (M2 M1, M2 N1 + N2). The same pair is what a device has to tell the next ones about its part of a sequence.
"""
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import chunk, triangular, xla
from pallas_kernels.segments import Segments


def gated_delta_rule(q, k, v, beta, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: [B,T,HV,V] outputs in v's dtype and the final state [B,HV,K,V]."""
    T = q.shape[1]
    inputs, span = xla.whole_chunks(xla.chunk_length(T), (q, k, v, beta, log_decay), segments)
    output, final_state = _run(scale, inputs, initial_state, span)
    return output[:, :T], final_state


def transition(prepared: chunk.Chunk) -> tuple[jax.Array, jax.Array]:
    """M [G,K,K] and N [G,K,V] of chunks that map a state S to M S + N."""
    C, K = prepared.writes.shape[1:]
    inverse = triangular.inverse(prepared.scores[:, C:])
    solved = jnp.einsum("gij,gjx->gix", inverse, jnp.concatenate([prepared.reads[:, C:], prepared.values], axis=2))
    both = jnp.einsum("gjk,gjx->gkx", prepared.writes, solved)
    identity = jnp.eye(K, dtype=both.dtype)
    return (identity if prepared.keep is None else identity * prepared.keep) - both[:, :, :K], both[:, :, K:]


def then(first, second):
    """The transition and increment of two stretches of tokens in a row."""
    (M1, N1), (M2, N2) = first, second
    return M2 @ M1, M2 @ N1 + N2


def _scan_states(M, N, first, reverse=False):
    """The states [B,N,HV,K,V] that chunks start from, and that after the last; with ``reverse`` the other way round in time."""
    M, N = jax.lax.associative_scan(then, (M, N), reverse=reverse, axis=1)
    after = M @ first[:, None] + N
    if reverse:
        return jnp.concatenate([after[:, 1:], first[:, None]], axis=1), after[:, 0]
    return jnp.concatenate([first[:, None], after[:, :-1]], axis=1), after[:, -1]


def _prepare(scale, dtype, span, inputs):
    """All chunks at once: G = B N HV."""
    C = xla.chunk_length(inputs[0].shape[1])
    inputs = jax.tree.map(lambda x: x.reshape(-1, C, *x.shape[2:]), inputs)
    if span is not None:
        span = chunk.Span(span.index.reshape(-1, C), span.real.reshape(-1, C), span.before.reshape(-1))
    return chunk.prepare(*inputs, span, scale, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(scale, inputs, initial_state, span):
    return _run_forward(scale, inputs, initial_state, span)[0]


def _run_forward(scale, inputs, initial_state, span):
    v, (B, HV, K, V) = inputs[2], initial_state.shape
    prepared = _prepare(scale, initial_state.dtype, span, inputs)
    M, N = (x.reshape(B, -1, HV, *x.shape[1:]) for x in transition(prepared))
    states, final_state = _scan_states(M, N, initial_state)
    output, _, solution = chunk.forward(prepared, states.reshape(-1, K, V))
    output = chunk.token_rows(output, output.shape[0] // HV).reshape(v.shape).astype(v.dtype)
    return (output, final_state), (inputs, states, solution, span)


def _run_backward(scale, residuals, cotangents):
    inputs, states, solution, span = residuals
    d_output, d_final_state = cotangents
    (K, V), dtype = states.shape[3:], states.dtype
    prepared, pull = jax.vjp(partial(_prepare, scale, dtype, span), inputs)
    d_output = chunk.select_real(d_output, span).astype(dtype)
    d_output = chunk.head_rows(d_output.reshape(-1, prepared.writes.shape[1], *d_output.shape[2:]))

    # The gradient of a state is M^T times that of the next one, plus what the chunk's own outputs give it.
    flat = states.reshape(-1, K, V)
    _, own = chunk.backward(prepared, flat, solution, d_output, jnp.zeros_like(flat))
    M, _ = transition(prepared)
    M = jnp.swapaxes(M, 1, 2).reshape(*states.shape[:3], K, K)
    d_next, d_state = _scan_states(M, own.reshape(states.shape), d_final_state, reverse=True)
    d_prepared, _ = chunk.backward(prepared, flat, solution, d_output, d_next.reshape(-1, K, V))
    return pull(d_prepared)[0], d_state, None


_run.defvjp(_run_forward, _run_backward)
