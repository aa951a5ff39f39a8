"""The short convolution as Mosaic GPU kernels for Hopper, forward and backward.

The operator is bound by memory. A block of 128 threads takes 256 channels, two a thread, through a block of tokens; nothing is shared
between threads, so tokens go from memory to registers and back, a chunk of them on its way while the one before is computed. Forward
reads x and writes y. Backward reads x and dy and writes dx: with s_t the sum before the activation, ds_t its gradient, and the taps
counted by their distance k from the token,

    s_t = sum_k w_k x_{t-k}    ds_t = dy_t act'(s_t)    dw_k = sum_t ds_t x_{t-k}    dx_t = sum_k w_k ds_{t+k}

so dx_t is complete W-1 tokens later, and a block goes through the first W-1 tokens of the next one too. No block waits for another.
Each has a sum of its own for dw, and XLA adds these up. Nearly all chunks are of one document, and a block is told where the next one
is that is not: only there does every token ask which documents are around it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import checks, platforms
from pallas_kernels.causal_conv import vjp, xla

FORWARD_CHUNK, BACKWARD_CHUNK = 16, 8  # tokens that are read ahead while as many are computed: what 128 registers have room for
LONGEST, SHORTEST = 256, 32  # tokens of a block, which reads its neighbours' W-1 nearest once more
BLOCKS = 3 * 132  # that fill an H100 or H200: a multiprocessor's registers have room for four
TAPS = (2, 3, 4)


class Plan(NamedTuple):
    """kept: W-1. tokens: T. block: tokens of a block of threads. channels, width: D, with padding, and those of a block of threads."""

    kept: int
    tokens: int
    block: int
    channels: int
    width: int

    @property
    def blocks(self) -> int:
        """Along the sequence."""
        return pl.cdiv(self.tokens, self.block)

    @property
    def ragged(self) -> bool:
        """Whether the last block goes on after the last token."""
        return self.tokens % self.block > 0


def plan(x, weight) -> Plan:
    """The longest blocks of which there are enough to fill the card."""
    (B, T, D), W = x.shape, weight.shape[1]
    width = 256 if D % 256 == 0 else 128
    columns = pl.cdiv(D, width)
    block = LONGEST
    while block > SHORTEST and B * columns * pl.cdiv(T, block) < BLOCKS:
        block //= 2
    return Plan(W - 1, T, block, columns * width, width)


def is_faster(x: jax.Array, weight: jax.Array) -> bool:
    """Whether this kernel is what to take for such arrays: all that it takes without a copy with padding in it."""
    return x.dtype in checks.KERNEL_DTYPES and weight.shape[1] in TAPS and x.shape[1] > 0 and x.shape[2] % 128 == 0


def causal_conv(x, weight, activation, initial_state, segments):
    """As the XLA form's, for x in float32 or bfloat16 and 2 to 4 taps; ValueError for others."""
    checks.check_kernel_dtypes("causal_conv", x=x)
    if weight.shape[1] not in TAPS:
        raise ValueError(f"causal_conv: weight has shape {weight.shape}, needs 2 to 4 taps in its last axis for implementation='pallas'")
    return vjp.causal_conv(PASSES, x, weight, activation, initial_state, segments)


def _forward(activation, x, weight, state, index):
    padded = plan(x, weight)
    operands = _operands(padded, FORWARD_CHUNK, x, weight, state, index)
    (y,) = _call(padded, _forward_kernel, "forward", activation, (jax.ShapeDtypeStruct(operands[0].shape, x.dtype),))(*operands)
    return y[:, :, : x.shape[2]]


def _backward(activation, x, weight, state, index, dy):
    B, _, D = x.shape
    padded = plan(x, weight)
    operands = _operands(padded, BACKWARD_CHUNK, x, weight, state, index)
    shapes = (
        jax.ShapeDtypeStruct(operands[0].shape, x.dtype),
        jax.ShapeDtypeStruct((B, padded.blocks, padded.kept + 1, padded.channels), jnp.float32),
    )
    dx, dweight = _call(padded, _backward_kernel, "backward", activation, shapes)(*operands, _wide(padded, dy))
    # The state's gradient is made of the first W-1 tokens', and nearly always asked for by nobody.
    x, index, dy = (None if a is None else a[:, : padded.kept] for a in (x, index, dy))
    _, _, dstate = xla.PASSES.backward(activation, x, weight, state, index, dy)
    return dx[:, :, :D], jnp.sum(dweight, axis=(0, 1)).T[:D], dstate


PASSES = vjp.Passes(_forward, _backward)


def _wide(plan, x):
    """An array of channels in its last axis with as many as the plan has."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, plan.channels - x.shape[-1])])


def _operands(plan, chunk, x, weight, state, index):
    """x, weight [W,D], state and, where there are documents or the last block goes on after the last token, two more.

    documents: [B,W-1+tokens of all blocks+W-1] int32, the index from W-1 tokens before the first on.
    ends: [B,chunks] int32, in its block the next chunk from this one on that is not of one document with the W-1 tokens before it.
    """
    B, T, _ = x.shape
    arrays = _wide(plan, x), _wide(plan, weight.T), _wide(plan, state)
    if index is None and not plan.ragged:
        return arrays
    index = jnp.zeros((B, T), jnp.int32) if index is None else index
    tokens = plan.blocks * plan.block
    documents = jnp.pad(index, [(0, 0), (plan.kept, 0)])  # the state's is the first
    documents = jnp.pad(documents, [(0, 0), (0, plan.kept + tokens - T)], constant_values=-1)
    chunks = jnp.stack([documents[:, i : i + tokens : chunk] for i in range(plan.kept + chunk)], axis=2)
    mixed = jnp.any((chunks != chunks[:, :, -1:]) | (chunks < 0), axis=2).reshape(B, plan.blocks, -1)
    count = mixed.shape[2]
    ends = jax.lax.cummin(jnp.where(mixed, jnp.arange(count, dtype=jnp.int32), count), axis=2, reverse=True)
    return *arrays, documents, ends.reshape(B, -1)


def _call(plan, kernel, name, activation, shapes):
    """The kernel on a grid of (B, blocks of tokens, columns of channels)."""
    return platforms.gpu_call(
        partial(kernel, plan, activation),
        name=f"causal_conv_{name}",
        out_type=shapes,
        grid=(shapes[0].shape[0], plan.blocks, plan.channels // plan.width),
        grid_names=("row", "block", "column"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,  # threads have nothing in common
        ),
    )


class _Place(NamedTuple):
    """Of a block of threads: its row, which of the row's blocks it is, and its channels."""

    row: jax.Array
    block: jax.Array
    channels: pl.Slice


def _place(plan) -> _Place:
    channels = pl.ds(platforms.gpu_index("column") * plan.width, plan.width)
    return _Place(platforms.gpu_index("row"), platforms.gpu_index("block"), channels)


def _walk(plan, chunk, place, refs, documents, token, sums):
    """sums = token(t, inside, around, rows, sums) over the tokens of a block.

    t: the token. inside: whether the one W-1 before it is of the block too. rows: the token's, of each of ``refs``.
    around: the documents of the token and the W-1 before it, its own first; None where there is one.
    documents: the references to those of a row's tokens and to where runs of chunks of one document end, or none.
    """
    first = place.block * plan.block
    # The chunk that the last one reads ahead is itself. What a chunk has beyond the last token is of no account: it is mixed.
    last = jnp.maximum(jnp.minimum(first + plan.block, plan.tokens) - chunk, 0)

    def fetch(t, i):
        return _rows(place, refs, jnp.minimum(t, last) + min(i, plan.tokens - 1))

    def plain(n, carry):
        rows, sums = carry
        t = first + n * chunk
        ahead = [fetch(t + chunk, i) for i in range(chunk)]
        for i, row in enumerate(rows):
            sums = token(t + i, i >= plan.kept or n > 0, None, row, sums)
        return ahead, sums

    def masked(n, carry):
        def one(i, sums):
            t = first + n * chunk + i
            row = _rows(place, refs, jnp.minimum(t, plan.tokens - 1))
            return token(t, t >= first + plan.kept, _around(plan, place, documents, t), row, sums)

        sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(chunk), one, carry[1])
        return [fetch(first + (n + 1) * chunk, i) for i in range(chunk)], sums

    def run(n_and_carry):
        n, carry = n_and_carry
        end = documents[1][place.row, place.block * chunks + n]
        carry = jax.lax.fori_loop(n, end, plain, carry)
        return end + 1, jax.lax.cond(end < chunks, partial(masked, end), lambda carry: carry, carry)

    start, chunks = jnp.int32(0), plan.block // chunk
    carry = [fetch(first, i) for i in range(chunk)], sums
    if documents:
        return jax.lax.while_loop(lambda n_and_carry: n_and_carry[0] < chunks, run, (start, carry))[1][1]
    return jax.lax.fori_loop(start, jnp.int32(chunks), plain, carry)[1]


def _rows(place, refs, t):
    return [ref[place.row, t, place.channels] for ref in refs]


def _around(plan, place, documents, t):
    """The documents of token t and the W-1 before it, its own first; None where there are none."""
    return [documents[0][place.row, t + plan.kept - k] for k in range(plan.kept + 1)] if documents else None


def _taps(place, weight_ref):
    """The weights by their distance from the token, its own first."""
    return [weight_ref[w, place.channels] for w in reversed(range(weight_ref.shape[0]))]


def _before(plan, place, x_ref, state_ref):
    """The W-1 inputs before the block in float32, the last first."""
    first, distances = place.block * plan.block, range(1, plan.kept + 1)
    return jax.lax.cond(
        place.block == 0,
        lambda: [state_ref[place.row, plan.kept - k, place.channels] for k in distances],
        lambda: [x_ref[place.row, first - k, place.channels].astype(jnp.float32) for k in distances],
    )


def _either(first, row, other):
    """A row, or another: the scalar ``first`` says which."""
    return jnp.where(jnp.broadcast_to(first, row.shape), row, other)


def _only(allowed, row):
    return _either(allowed, row, jnp.zeros_like(row))


def _allowed(around):
    """Of each tap, the token's own first, whether it may meet a token: one of the same document, and no padding."""
    own = around[0]
    return [own >= 0, *((document == own) & (own >= 0) for document in around[1:])]


def _sum(weight, met):
    return sum(w * x for w, x in zip(weight[1:], met[1:], strict=True)) + weight[0] * met[0]


def _sigmoid(x):
    root = jax.lax.rsqrt(1 + jnp.exp(-x))  # of which there is an instruction, and none for a quotient
    return root * root


def _forward_kernel(plan, activation, x_ref, weight_ref, state_ref, *others):
    *documents, y_ref = others
    place = _place(plan)
    weight = _taps(place, weight_ref)

    def token(t, _, around, rows, before):
        met = [rows[0].astype(jnp.float32), *before]
        if around is not None:
            met = list(map(_only, _allowed(around), met))
        y = _sum(weight, met)
        y = y * _sigmoid(y) if activation == "silu" else y

        @pl.when(around is None or t < plan.tokens)
        def _():
            y_ref[place.row, t, place.channels] = y.astype(y_ref.dtype)

        return met[:1] + before[:-1]

    _walk(plan, FORWARD_CHUNK, place, [x_ref], documents, token, _before(plan, place, x_ref, state_ref))


def _backward_kernel(plan, activation, x_ref, weight_ref, state_ref, *others):
    *documents, dy_ref, dx_ref, dweight_ref = others
    place = _place(plan)
    weight = _taps(place, weight_ref)
    kept = plan.kept
    end = (place.block + 1) * plan.block

    def token(t, inside, around, rows, sums):
        before, unfinished, dweight = sums  # inputs and their gradients so far, the last first, and the gradients of the taps
        x, ds = (row.astype(jnp.float32) for row in rows)
        met = [x, *before]
        if around is not None:
            allowed = _allowed(around)
            met, ds = list(map(_only, allowed, met)), _only(allowed[0], ds)
        if activation == "silu":
            s = _sum(weight, met)
            gate = _sigmoid(s)
            ds = ds * (gate + gate * (s - s * gate))
        dweight = [total + ds * x for total, x in zip(dweight, met, strict=True)]
        dx = [total + w * ds for total, w in zip(unfinished, weight[1:], strict=True)]
        if around is not None:
            dx = list(map(_either, allowed[1:], dx, unfinished))

        # The gradient of the input W-1 tokens before is complete, or the block before's.
        @pl.when(inside & (around is None or t - kept < plan.tokens))
        def _():
            dx_ref[place.row, t - kept, place.channels] = dx[-1].astype(dx_ref.dtype)

        return met[:1] + before[:-1], [weight[0] * ds, *dx[:-1]], dweight

    zero = jnp.zeros((plan.width,), jnp.float32)
    sums = _before(plan, place, x_ref, state_ref), [zero] * kept, [zero] * (kept + 1)
    sums = _walk(plan, BACKWARD_CHUNK, place, [x_ref, dy_ref], documents, token, sums)
    for k, total in enumerate(sums[2]):
        dweight_ref[place.row, place.block, kept - k, place.channels] = total
    for t in (end + i for i in range(kept)):
        x, dy = _rows(place, [x_ref, dy_ref], jnp.minimum(t, plan.tokens - 1))
        dy = _only(t < plan.tokens, dy)
        sums = token(t, True, _around(plan, place, documents, t), [x, dy], sums)
