"""h_t = a_t * h_{t-1} + x_t as Mosaic GPU kernels for Hopper, forward and backward.

The operator is bound by memory. A block of 128 threads takes 128 channels, a thread each, through the tokens in order; the copy
engine (TMA) fetches chunks of tokens several stages ahead and writes results behind. Forward reads a and x and writes h. Backward is the
same recurrence in the other direction, with u_t = a_{t+1} e_{t+1} between the tokens, and takes h as it was written:

    e_t = dh_t + u_t    dx_t = e_t    da_t = e_t h_{t-1}    u_{t-1} = a_t e_t

So each reads and writes every element once, and x is not kept. Where batch and channels give fewer blocks than the card has
multiprocessors, the sequence is cut into pieces: a pass before, over all pieces but the last, finds what each does to a state,
s -> P s + R, and the state each piece begins with is combined from those.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import checks, platforms

CHANNELS = 128  # of a block, whose threads have one each
MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)
CHUNK = 16  # tokens fetched at once
SHORTEST = 256  # tokens of a piece: in fewer, filling and draining the pipeline of copies takes as long as the copies
# Chunks in flight or at work. Two blocks fit a multiprocessor's shared memory in bfloat16 beside a float32 decay.
FORWARD_STAGES, BACKWARD_STAGES = 6, 4


class Plan(NamedTuple):
    """tokens, channels: T and D with padding. pieces: that the sequence is cut into."""

    tokens: int
    channels: int
    pieces: int

    @property
    def chunks(self) -> int:
        """Of a piece."""
        return self.tokens // (self.pieces * CHUNK)


def plan(B: int, T: int, D: int) -> Plan:
    """As many pieces as there are multiprocessors for."""
    columns = pl.cdiv(D, CHANNELS)
    pieces = max(1, min(MULTIPROCESSORS // (B * columns), T // SHORTEST))
    return Plan(pl.cdiv(T, pieces * CHUNK) * pieces * CHUNK, columns * CHANNELS, pieces)


def is_faster(decay: jax.Array, x: jax.Array) -> bool:
    """Whether this kernel is what to take for such arrays: all that it takes without a copy with padding in it."""
    return all(a.dtype in checks.KERNEL_DTYPES for a in (decay, x)) and x.shape[2] % CHANNELS == 0


def linear_scan(decay: jax.Array, x: jax.Array, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """decay, x [B,T,D] in float32 or bfloat16, initial_state [B,D] -> (h [B,T,D] in x's dtype, the final state [B,D] in float32).

    Raises ValueError for other dtypes.
    """
    checks.check_kernel_dtypes("linear_scan", decay=decay, x=x)
    B, T, D = x.shape
    padded = plan(B, T, D)
    extra = [(0, 0), (0, padded.tokens - T), (0, padded.channels - D)]
    # Tokens beyond T keep the state.
    decay, x = jnp.pad(decay, extra, constant_values=1), jnp.pad(x, extra)
    h, final_state = _scan(padded, decay, x, jnp.pad(initial_state.astype(jnp.float32), [extra[0], extra[2]]))
    return h[:, :T, :D], final_state[:, :D]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, decay, x, initial_state):
    return _scan_forward(plan, decay, x, initial_state)[0]


def _scan_forward(plan, decay, x, initial_state):
    before = _piece_states(plan, decay, x, initial_state, reverse=False)
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(before.shape, jnp.float32)
    h, after = _call(plan, _forward_kernel, "forward", shapes)(decay, x, before)
    return (h, after[:, -1]), (decay, initial_state, h)


def _scan_backward(plan, residuals, cotangents):
    decay, initial_state, h = residuals
    dh, d_final_state = cotangents
    after = _piece_states(plan, decay, dh, d_final_state, reverse=True)
    starts = jnp.concatenate([initial_state[:, None], h[:, CHUNK - 1 : -1 : CHUNK].astype(jnp.float32)], axis=1)  # of chunks
    shapes = (
        jax.ShapeDtypeStruct(decay.shape, decay.dtype),
        jax.ShapeDtypeStruct(dh.shape, dh.dtype),
        jax.ShapeDtypeStruct(after.shape, jnp.float32),
    )
    d_decay, dx, before = _call(plan, _backward_kernel, "backward", shapes)(decay, h, dh, starts, after)
    return d_decay, dx, before[:, 0]


_scan.defvjp(_scan_forward, _scan_backward)


def _piece_states(plan, decay, x, state, reverse):
    """[B,pieces,D], the state that each piece meets first: before it, or where ``reverse`` (x is dh, a state u) after it."""
    states = [state]
    if plan.pieces > 1:
        maps = jax.ShapeDtypeStruct((x.shape[0], plan.pieces - 1, x.shape[2]), jnp.float32)
        product, increment = _call(plan, _summary_kernel, "summary", (maps, maps), reverse, but=1)(decay, x)
        for piece in range(plan.pieces - 1)[:: -1 if reverse else 1]:
            states.append(product[:, piece] * states[-1] + increment[:, piece])
    return jnp.stack(states[::-1] if reverse else states, axis=1)


def _call(plan, kernel, name, shapes, *options, but=0):
    """The kernel on a grid of (B, pieces, columns of channels), of the pieces all ``but`` some."""
    B, _, D = shapes[0].shape
    return platforms.gpu_call(
        partial(kernel, plan, *options),
        name=f"linear_scan_{name}",
        out_type=shapes,
        grid=(B, plan.pieces - but, D // CHANNELS),
        grid_names=("row", "piece", "column"),
        # A barrier of its own around every store would cost more than the recurrence. None is needed where results are written: a chunk's
        # inputs are only read and its outputs only written, and the pipeline has a barrier between that and the copies of the next.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=kernel is not _summary_kernel,
        ),
    )


def _place():
    """(row, piece, the channels) of this block."""
    return platforms.gpu_index("row"), platforms.gpu_index("piece"), pl.ds(platforms.gpu_index("column") * CHANNELS, CHANNELS)


def _over_chunks(plan, body, carry, piece, stages, inputs, outputs=(), reverse=False):
    """carry = body(chunks of the inputs, of the outputs, carry) over a piece's chunks of ``inputs`` and ``outputs``.

    Those are [T,D], or [chunks of the sequence,D], and are fetched and written back by the copy engine meanwhile.
    """
    column = platforms.gpu_index("column")

    def at(n):
        return piece * plan.chunks + (plan.chunks - 1 - n if reverse else n)

    def run(*buffers):
        def step(indices, *chunks_and_carry):
            *chunks, carry = chunks_and_carry
            if not outputs:
                carry = body(chunks, (), carry)
                plgpu.commit_smem()  # the copy engine writes to what was just read
                return carry
            (n,) = indices
            written = [buffer.at[n % 2] for buffer in buffers]
            plgpu.wait_smem_to_gmem(len(outputs), wait_read_only=True)  # all copies but the last step's, which are of the other buffers
            carry = body(chunks, written, carry)
            plgpu.commit_smem()
            for chunk, ref in zip(written, outputs, strict=True):
                plgpu.copy_smem_to_gmem(chunk, ref.at[pl.ds(at(n) * CHUNK, CHUNK), pl.ds(column * CHANNELS, CHANNELS)])
            return carry

        pipeline = plgpu.emit_pipeline(
            step,
            grid=(plan.chunks,),
            in_specs=[plgpu.BlockSpec((ref.shape[0] // (plan.tokens // CHUNK), CHANNELS), lambda n: (at(n), column)) for ref in inputs],
            max_concurrent_steps=stages,
            init_carry=carry,
        )
        result = pipeline(*inputs)
        if outputs:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return result

    return pl.run_scoped(run, *(plgpu.SMEM((2, CHUNK, CHANNELS), ref.dtype) for ref in outputs))


def _row(ref):
    return ref[...].astype(jnp.float32)


def _first(ref):
    """A row of an operand, as the first carry of a loop; the addition drops that it varies over a mesh (:func:`.platforms.gpu_call`)."""
    return _row(ref) + jnp.zeros(ref.shape, jnp.float32)


def _rows(ref):
    """The tokens of a chunk, loaded all before any is used, so that no load waits for a store."""
    return [_row(ref.at[t]) for t in range(CHUNK)]


def _summary_kernel(plan, reverse, decay_ref, x_ref, product_ref, increment_ref):
    row, piece, channels = _place()

    def chunk(inputs, _, carry):
        product, state = carry
        for decay, x in list(zip(*map(_rows, inputs), strict=True))[:: -1 if reverse else 1]:
            product, state = decay * product, decay * (x + state) if reverse else decay * state + x
        return product, state

    identity = jnp.ones((CHANNELS,), jnp.float32), jnp.zeros((CHANNELS,), jnp.float32)
    inputs = decay_ref.at[row], x_ref.at[row]
    product, state = _over_chunks(plan, chunk, identity, piece + reverse, FORWARD_STAGES, inputs, reverse=reverse)
    product_ref[row, piece, channels] = product
    increment_ref[row, piece, channels] = state


def _forward_kernel(plan, decay_ref, x_ref, before_ref, h_ref, after_ref):
    row, piece, channels = _place()

    def chunk(inputs, outputs, state):
        (h_ref,) = outputs
        for t, (decay, x) in enumerate(zip(*map(_rows, inputs), strict=True)):
            state = decay * state + x
            h_ref[t] = state.astype(h_ref.dtype)
        return state

    inputs, outputs = (decay_ref.at[row], x_ref.at[row]), (h_ref.at[row],)
    state = _first(before_ref.at[row, piece, channels])
    after_ref[row, piece, channels] = _over_chunks(plan, chunk, state, piece, FORWARD_STAGES, inputs, outputs)


def _backward_kernel(plan, decay_ref, h_ref, dh_ref, starts_ref, after_ref, d_decay_ref, dx_ref, before_ref):
    row, piece, channels = _place()

    def chunk(inputs, outputs, u):
        (decay_ref, h_ref, dh_ref, start_ref), (d_decay_ref, dx_ref) = inputs, outputs
        decay, dh = _rows(decay_ref), _rows(dh_ref)
        previous = [_row(start_ref.at[0]), *_rows(h_ref)[:-1]]
        for t in reversed(range(CHUNK)):
            e = dh[t] + u
            dx_ref[t] = e.astype(dx_ref.dtype)
            d_decay_ref[t] = (e * previous[t]).astype(d_decay_ref.dtype)
            u = decay[t] * e
        return u

    inputs = [ref.at[row] for ref in (decay_ref, h_ref, dh_ref, starts_ref)]
    outputs = d_decay_ref.at[row], dx_ref.at[row]
    u = _first(after_ref.at[row, piece, channels])
    before_ref[row, piece, channels] = _over_chunks(plan, chunk, u, piece, BACKWARD_STAGES, inputs, outputs, reverse=True)
