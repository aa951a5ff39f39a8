"""Chunked gated linear attention as a loop over chunks, with a VJP that keeps the state before each.

Chunks are cut out of the arrays inside the loop: arrays handed to ``lax.scan`` as its inputs are copied first, which on a CPU
was measured to cost as much as a third of the whole.
"""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention import chunk
from pallas_kernels.segments import Segments

# The fastest of 16, 32, 64 and 128 on a CPU, forward and backward together.
CHUNK_PER_HEAD = 64
CHUNK_PER_CHANNEL = 32


def gated_linear_attention(q, k, v, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in v's dtype, the final state [B,HV,K,V])."""
    inputs = q, k, v, log_decay
    return run(Plan(scale, chunk_length(inputs), 1, chunk.one), inputs, initial_state, segments)


class Plan(NamedTuple):
    """scale, C, how many chunks a step of the loop takes side by side, and what combines their states."""

    scale: float
    length: int
    chunks: int
    combine: chunk.Combine

    @property
    def tokens(self) -> int:
        return self.length * self.chunks

    @property
    def forward(self) -> Callable:
        return partial(chunk.forward, scale=self.scale, length=self.length, combine=self.combine)


def chunk_length(inputs) -> int:
    """The chunk length for the kind of decay, or for a short sequence the least power of two that holds it."""
    T, longest = inputs[0].shape[1], CHUNK_PER_CHANNEL if inputs[3].ndim == 4 else CHUNK_PER_HEAD
    return min(longest, 1 << (T - 1).bit_length())


def run(plan: Plan, inputs, initial_state, segments: Segments | None):
    """(q, k, v, log_decay) of any T, in the steps of ``plan``."""
    q, k, v, log_decay = inputs
    B, T = q.shape[:2]
    padding = -T % plan.tokens
    if log_decay.ndim == 1 and (padding or segments is not None):  # padded tokens do not decay, so not all decay alike
        log_decay = jnp.broadcast_to(log_decay, (B, T, *log_decay.shape))

    def pad(x, **kind):
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), **kind) if padding else x

    inputs = tuple(x if x.ndim == 1 else pad(x) for x in (q, k, v, log_decay))
    span = None
    if segments is not None:
        index = pad(segments.index, mode="edge")
        before = jnp.pad(index[:, plan.length - 1 : -1 : plan.length], [(0, 0), (1, 0)])
        span = chunk.Span(index, pad(segments.real), before)
    o, final_state = _loop(plan, inputs, initial_state, span)
    return o[:, :T], final_state


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(plan, inputs, initial_state, span):
    def step(state, n):
        o, state = plan.forward(_cut(plan, inputs, n), state, _cut_span(plan, span, n))
        return state, o

    final_state, o = jax.lax.scan(step, initial_state, _steps(plan, inputs))
    return _joined(o), final_state


def _loop_forward(plan, inputs, initial_state, span):
    def step(state, n):
        o, after = plan.forward(_cut(plan, inputs, n), state, _cut_span(plan, span, n))
        return after, (o, state)

    final_state, (o, states) = jax.lax.scan(step, initial_state, _steps(plan, inputs))
    return (_joined(o), final_state), (inputs, states, span)


def _loop_backward(plan, residuals, cotangents):
    inputs, states, span = residuals
    d_o, d_final_state = cotangents

    def step(d_state, n):
        forward = partial(plan.forward, span=_cut_span(plan, span, n))
        _, pull = jax.vjp(forward, _cut(plan, inputs, n), states[n])
        d_inputs, d_state = pull((_tokens(plan, d_o, n), d_state))
        return d_state, d_inputs

    d_initial_state, d_inputs = jax.lax.scan(step, d_final_state, jnp.arange(states.shape[0]), reverse=True)
    d_inputs = tuple(jnp.sum(d, axis=0) if x.ndim == 1 else _joined(d) for x, d in zip(inputs, d_inputs, strict=True))
    return d_inputs, d_initial_state, None


_loop.defvjp(_loop_forward, _loop_backward)


def _steps(plan, inputs):
    return jnp.arange(inputs[0].shape[1] // plan.tokens)


def _tokens(plan, x, n):
    return jax.lax.dynamic_slice_in_dim(x, n * plan.tokens, plan.tokens, axis=1)


def _cut(plan, inputs, n):
    return tuple(x if x.ndim == 1 else _tokens(plan, x, n) for x in inputs)


def _cut_span(plan, span, n):
    if span is None:
        return None
    before = jax.lax.dynamic_slice_in_dim(span.before, n * plan.chunks, plan.chunks, axis=1)
    return chunk.Span(_tokens(plan, span.index, n), _tokens(plan, span.real, n), before)


def _joined(x):
    """[N,B,C,...] -> [B,N C,...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
