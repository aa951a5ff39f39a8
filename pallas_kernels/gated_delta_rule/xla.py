"""The chunked gated delta rule as a loop over chunks, with a VJP that keeps its inputs, one state a chunk and what was solved there.

All products of a chunk are computed inside the loop: batched over all chunks outside of it they are larger but go through
memory, which was measured to cost more. For the same reason a CPU takes shorter chunks, and a few heads at a time through
all of T, few enough for a chunk's arrays to stay in its cache; other devices take all heads at once.
"""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.gated_delta_rule import chunk
from pallas_kernels.segments import Segments

CHUNK = 64
CHUNK_ON_CPU = 32
HEADS_ON_CPU = 8


def gated_delta_rule(q, k, v, beta, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: [B,T,HV,V] outputs in v's dtype and the final state [B,HV,K,V]."""
    (B, T, H), HV = q.shape[:3], v.shape[2]
    across = next(n for n in range(1, H + 1) if H % n == 0 and (HV // n <= HEADS_ON_CPU or n == H))
    few = _Tiles(B, 1, across, chunk_length(T, CHUNK_ON_CPU))
    whole = _Tiles(1, B, 1, chunk_length(T))
    arguments = (q, k, v, beta, log_decay), initial_state, segments
    return platforms.by_platform(*arguments, cpu=partial(_chunked, scale, few), default=partial(_chunked, scale, whole))


def chunk_length(T: int, longest: int = CHUNK) -> int:
    """``longest``, or for a short sequence the smallest power of 2 from 16 on that holds it."""
    return min(longest, max(16, 1 << (T - 1).bit_length()))


def whole_chunks(C: int, inputs, segments: Segments | None):
    """The inputs with T padded to whole chunks by zeros, which change no state, and all their spans: [B,T], [B,T], [B,N]."""
    T = inputs[0].shape[1]

    def pad(x, **kind):
        return x if T % C == 0 else jnp.pad(x, [(0, 0), (0, -T % C)] + [(0, 0)] * (x.ndim - 2), **kind)

    inputs = jax.tree.map(pad, inputs)
    if segments is None:
        return inputs, None
    index = pad(segments.index, mode="edge")
    before = jnp.pad(index[:, C - 1 : -1 : C], [(0, 0), (1, 0)])
    return inputs, chunk.Span(index, pad(segments.real), before)


def _chunked(scale, tiles: "_Tiles", inputs, initial_state, segments):
    T = inputs[0].shape[1]
    inputs, span = whole_chunks(tiles.C, inputs, segments)
    output, final_state = _run(scale, tiles, inputs, initial_state, span)
    return output[:, :T], final_state


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(scale, tiles, inputs, initial_state, span):
    return _forward_loop(scale, False, tiles, inputs, initial_state, span)[:2]


def _run_forward(scale, tiles, inputs, initial_state, span):
    output, final_state, kept = _forward_loop(scale, True, tiles, inputs, initial_state, span)
    return (output, final_state), (inputs, kept, span)


def _run_backward(scale, tiles, residuals, cotangents):
    return *_backward_loop(scale, tiles, *residuals, *cotangents), None


_run.defvjp(_run_forward, _run_backward)


class _Tiles(NamedTuple):
    """A cut of the batch and the heads into parts that are taken through all of T one after another."""

    down: int  # parts of the batch,
    rows: int  # of so many rows each
    across: int  # parts of the heads
    C: int

    def take(self, x, i, n, length):
        """Elements ``n`` of ``length`` of axis 1, of part ``i``: [B,T,H,...] -> [rows,length,H/across,...]."""
        size = (self.rows, length, x.shape[2] // self.across)
        return jax.lax.dynamic_slice(x, self._start(x, i, n, length), size + x.shape[3:])

    def put(self, x, part, i, n):
        """``x`` with what :meth:`take` takes replaced by ``part``."""
        return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), self._start(x, i, n, part.shape[1]))

    def span(self, span: chunk.Span | None, i, n):
        if span is None:
            return None
        rows = self._replace(across=1)
        index, real = (rows.take(x[:, :, None], i // self.across, n, self.C)[:, :, 0] for x in (span.index, span.real))
        return chunk.Span(index, real, rows.take(span.before[:, :, None], i // self.across, n, 1)[:, 0, 0])

    def _start(self, x, i, n, length):
        return (i // self.across * self.rows, n * length, i % self.across * (x.shape[2] // self.across)) + (0,) * (x.ndim - 3)

    def chunk_inputs(self, inputs, i, n):
        return jax.tree.map(lambda x: self.take(x, i, n, self.C), inputs)

    def take_chunk(self, x, i, n):
        """Chunk ``n`` of part ``i`` of [B,N,HV,...], as [G,...]."""
        return self.take(x, i, n, 1).reshape(-1, *x.shape[3:])

    def put_chunk(self, x, part, i, n):
        return self.put(x, part.reshape(self.rows, 1, -1, *part.shape[1:]), i, n)


class Kept(NamedTuple):
    """What the forward pass keeps of every chunk for the backward pass, each [B,N,HV,...]."""

    state: jax.Array  # that the chunk starts from
    solution: chunk.Solution


def _forward_loop(scale, keep, tiles: _Tiles, inputs, initial_state, span):
    """Outputs [B,T,HV,V], the final state [B,HV,K,V] and, if asked for, what is kept for the backward pass."""
    v, dtype = inputs[2], initial_state.dtype
    N = v.shape[1] // tiles.C
    initial_state = initial_state[:, None]

    def part(i, carry):
        def step(n, carry):
            state, output, kept = carry
            prepared = chunk.prepare(*tiles.chunk_inputs(inputs, i, n), tiles.span(span, i, n), scale, dtype)
            out, next_state, solution = chunk.forward(prepared, state)
            if keep:
                kept = jax.tree.map(lambda x, part: tiles.put_chunk(x, part, i, n), kept, Kept(state, solution))
            return next_state, tiles.put(output, chunk.token_rows(out, tiles.rows), i, n), kept

        output, final_state, kept = carry
        state, output, kept = jax.lax.fori_loop(0, N, step, (tiles.take_chunk(initial_state, i, 0), output, kept))
        return output, tiles.put_chunk(final_state, state, i, 0), kept

    kept = _empty(initial_state, N, tiles.C) if keep else None
    empty = jnp.zeros_like(v), jnp.zeros_like(initial_state), kept
    output, final_state, kept = jax.lax.fori_loop(0, tiles.down * tiles.across, part, empty)
    return output, final_state[:, 0], kept


def _empty(initial_state, N, C) -> Kept:
    B, _, HV, K, V = initial_state.shape

    def zeros(*shape):
        return jnp.zeros_like(initial_state, shape=(B, N, HV, *shape))

    return Kept(zeros(K, V), chunk.Solution(zeros(C, V), zeros(C, C)))


def _backward_loop(scale, tiles: _Tiles, inputs, kept: Kept, span, d_output, d_final_state):
    """Gradients of the inputs and of the initial state."""
    N, dtype = kept.state.shape[1], kept.state.dtype
    d_final_state = d_final_state[:, None]

    def part(i, carry):
        def step(m, carry):
            d_next, d_inputs = carry
            n = N - 1 - m
            here = tiles.span(span, i, n)
            prepared, pull = jax.vjp(lambda x: chunk.prepare(*x, here, scale, dtype), tiles.chunk_inputs(inputs, i, n))
            state, solution = jax.tree.map(lambda x: tiles.take_chunk(x, i, n), kept)
            d_out = chunk.head_rows(chunk.select_real(tiles.take(d_output, i, n, tiles.C), here).astype(dtype))
            d_prepared, d_state = chunk.backward(prepared, state, solution, d_out, d_next)
            return d_state, jax.tree.map(lambda d, x: tiles.put(d, x, i, n), d_inputs, pull(d_prepared)[0])

        d_inputs, d_initial_state = carry
        d_state, d_inputs = jax.lax.fori_loop(0, N, step, (tiles.take_chunk(d_final_state, i, 0), d_inputs))
        return d_inputs, tiles.put_chunk(d_initial_state, d_state, i, 0)

    empty = jax.tree.map(jnp.zeros_like, inputs), jnp.zeros_like(d_final_state)
    d_inputs, d_initial_state = jax.lax.fori_loop(0, tiles.down * tiles.across, part, empty)
    return d_inputs, d_initial_state[:, 0]
