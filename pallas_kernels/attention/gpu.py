"""Attention on Hopper GPUs: cuDNN's where a row is one document, and else kernels that know documents, padding and windows.

The kernels (:mod:`.gpu_kernels`) are FlashAttention in the form of Shah et al. 2024 without its overlap of softmax and products: two
warpgroups compute, one loads. Blocks that no query of a tile reaches are not visited, so that packed documents cost what they are.
Rows are padded to whole tiles and heads to multiples of 64 channels, with zeros.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kept, platforms
from pallas_kernels.attention import gpu_kernels
from pallas_kernels.attention.gpu_kernels import ROWS, STAGES, TILE, WARPGROUPS, Visits, numbers, tokens
from pallas_kernels.attention.reach import Ranges, blocks_at, ranges, ranges_of_whole_rows
from pallas_kernels.segments import Segments

LARGEST_HEAD = 128  # channels: with more, a tile of keys and its gradients does not fit in registers


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether these kernels take such arrays; they have not been timed on a card yet (docs/gpu.md)."""
    return all(a.dtype == jnp.bfloat16 and a.shape[-1] <= LARGEST_HEAD for a in (q, k, v))


def attention(q, k, v, scale, window, segments: Segments | None):
    """See api.py. Raises ValueError for dtypes other than bfloat16 and for heads of more than 128 channels."""
    _check(q=q, k=k, v=v)
    B, T = q.shape[:2]
    if segments is None and _cudnn_takes(q, v):
        return _by_cudnn(q, k, v, scale, window)
    if segments is None:
        reach = ranges_of_whole_rows(B, T, window, -T % TILE)
    else:  # what padding holds, nan included, ends here
        reach = ranges(segments, window, -T % TILE)
        q, k, v = (_only_real(a, segments.real) for a in (q, k, v))
    q, k, v = (jnp.pad(a, [(0, 0), (0, -T % TILE), (0, 0), (0, 0)]) for a in (q, k, v))
    return _whole_channels(scale, q, k, v, reach, jnp.arange(q.shape[1] // TILE, dtype=jnp.int32))[:, :T]


def attention_stretch(q, k, v, scale, window, segments: Segments, places):
    """The queries of some of equal stretches, whole tiles, against the keys of all; see stretch.py."""
    _check(q=q, k=k, v=v)
    T = q.shape[1] // len(places)
    return _whole_channels(scale, q, k, v, ranges(segments, window).of_queries(places, T), blocks_at(places, T // TILE))


@jax.custom_vjp
def _only_real(x, real):
    """x [B,T,H,K] with zeros at padding. What the kernels give it for a gradient has them there already."""
    return jnp.where(real[:, :, None, None], x, 0)


_only_real.defvjp(lambda x, real: (_only_real(x, real), None), lambda _, gradient: (gradient, None))


def block_length(T: int) -> int:
    """Tokens of which a stretch has to have whole blocks."""
    return TILE


def _check(**arrays):
    for name, a in arrays.items():
        if a.dtype != jnp.bfloat16:
            raise ValueError(f"attention: {name} has dtype {a.dtype}, needs bfloat16 for implementation='pallas' on a GPU")
        if a.shape[-1] > LARGEST_HEAD:
            wanted = f"needs {LARGEST_HEAD} at most for implementation='pallas' on a GPU"
            raise ValueError(f"attention: {name} has heads of {a.shape[-1]}, {wanted}")


def _whole_channels(scale, q, k, v, reach, places):
    """:func:`_attend` of heads of any width, and any scale."""
    if scale <= 0:  # the kernels look for a row's largest score before they scale it
        q, scale = q * jnp.sign(scale).astype(q.dtype), -scale or 1.0
    padded = (jnp.pad(a, [(0, 0), (0, 0), (0, 0), (0, -a.shape[-1] % 64)]) for a in (q, k, v))
    return _attend(scale, *padded, reach, places)[..., : v.shape[-1]]


def _cudnn_takes(q, v) -> bool:
    """cuDNN is asked for on the machine that the program is traced on: JAX looks for its version there. Of an odd number of tokens it
    would have no gradients."""
    even = q.shape[1] % 2 == 0 and q.shape[-1] % 8 == 0
    return jax.default_backend() == "gpu" and q.shape[-1] == v.shape[-1] and even


def _by_cudnn(q, k, v, scale, window, implementation="cudnn"):
    reach = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, local_window_size=reach, implementation=implementation)


class Plan(NamedTuple):
    """Of one kernel. scale; tiles: of TILE tokens; block: tokens of the other side at a time; group: H / HK; keys, values: K and V."""

    scale: float
    tiles: int
    block: int
    group: int
    keys: int
    values: int

    @classmethod
    def of(cls, scale, own, q, k, v, block: int) -> "Plan":
        """own: q or k, of whose tokens a program has a tile."""
        return cls(scale, own.shape[1] // TILE, block, q.shape[2] // k.shape[2], k.shape[3], v.shape[3])

    def call(self, body, operands, results, *, own, loads, streamed):
        """own, streamed: the scratch of the tile, of which the first ``loads`` are loaded, and of the blocks that go by."""
        barriers = (
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=loads, num_barriers=WARPGROUPS),
        )
        B, _, H, _ = operands[0].shape
        return platforms.gpu_call(
            partial(body, self),
            name=f"attention_{body.__name__}",
            out_type=results,
            grid=(B, H, self.tiles),
            grid_names=("batch", "head", "tile"),
            num_threads=WARPGROUPS + 1,
            thread_name="wg",
            scratch_types=[own, streamed, barriers],
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(*operands)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, reach: Ranges, places):
    """q [B,T,H,K], k [B,S,HK,K], v [B,S,HK,V], T and S whole tiles, K and V multiples of 64 -> [B,T,H,V].

    places: [T/TILE] int32, ascending: which tile of the row each tile of queries is.
    """
    return _forward(scale, q, k, v, reach, places)[0]


def _forward(scale, q, k, v, reach, places):
    """(output [B,T,H,V], the logsumexp [B,H,T] of base-2 logarithms)."""
    plan = Plan.of(scale, q, q, k, v, block=TILE)
    B, T, H, K = q.shape
    return plan.call(
        gpu_kernels.of_queries,
        (q, k, v, reach.first, reach.count, reach.key, _blocks_of_keys(plan, reach, places)),
        (jax.ShapeDtypeStruct((B, T, H, plan.values), v.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        own=[
            tokens(ROWS, K, WARPGROUPS),
            *[numbers(ROWS, jnp.int32, WARPGROUPS)] * 2,
            tokens(ROWS, plan.values, WARPGROUPS),
            numbers(ROWS, jnp.float32, WARPGROUPS),
        ],
        loads=3,
        streamed=_keys_and_values(plan),
    )


def _attend_forward(scale, q, k, v, reach, places):
    output, logsumexp = _forward(scale, q, k, v, reach, places)
    output, logsumexp = kept.of_attention(output, logsumexp)
    return output, (q, k, v, reach, places, output, logsumexp)


def _attend_backward(scale, residuals, d_output):
    q, k, v, reach, places, output, logsumexp = residuals
    B, S, H, K = *k.shape[:2], *q.shape[2:]
    mean = jnp.einsum("bthv,bthv->bht", output, d_output, preferred_element_type=jnp.float32)

    plan = Plan.of(scale, q, q, k, v, block=TILE if max(K, v.shape[3]) <= 64 else ROWS)  # what fits in registers
    (dq,) = plan.call(
        gpu_kernels.d_queries,
        (q, k, v, d_output, reach.first, reach.count, reach.key, _blocks_of_keys(plan, reach, places), logsumexp, mean),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        own=[
            tokens(ROWS, K, WARPGROUPS),
            tokens(ROWS, plan.values, WARPGROUPS),
            *[numbers(ROWS, jnp.int32, WARPGROUPS)] * 2,
            *[numbers(ROWS, jnp.float32, WARPGROUPS)] * 2,
        ],
        loads=6,
        streamed=_keys_and_values(plan),
    )

    plan = Plan.of(scale, k, q, k, v, block=ROWS)
    dk, dv = plan.call(
        gpu_kernels.d_keys,
        (q, k, v, d_output, reach.first, reach.count, reach.key, _blocks_of_queries(plan, reach, places), logsumexp, mean),
        tuple(jax.ShapeDtypeStruct((B, S, H, width), q.dtype) for width in (K, plan.values)),
        own=[tokens(ROWS, K, WARPGROUPS), tokens(ROWS, plan.values, WARPGROUPS), numbers(ROWS, jnp.int32, WARPGROUPS)],
        loads=3,
        streamed=[
            tokens(ROWS, K, STAGES),
            tokens(ROWS, plan.values, STAGES),
            *[numbers(ROWS, jnp.int32, STAGES)] * 2,
            *[numbers(ROWS, jnp.float32, STAGES)] * 2,
        ],
    )
    return dq, _of_shared_heads(dk, plan.group), _of_shared_heads(dv, plan.group), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _keys_and_values(plan):
    return [tokens(plan.block, plan.keys, STAGES), tokens(plan.block, plan.values, STAGES), numbers(plan.block, jnp.int32, STAGES)]


def _blocks_of_keys(plan, reach: Ranges, places):
    """For each tile of queries, [B,tiles,4] (:class:`Visits`), from the first block of keys whose last one the first query reaches to the
    tile's own.
    """
    unreached = reach.rank[:, None, plan.block - 1 :: plan.block] < reach.first[:, ::TILE, None]
    begin = jnp.sum(unreached, axis=2, dtype=jnp.int32)
    end = (places + 1) * (TILE // plan.block)
    first, last = _cut(reach.first, TILE).max(2), _cut(reach.last, TILE).min(2)
    keys = _cut(reach.key, plan.block)
    whole = (first[:, :, None] <= keys.min(2)[:, None]) & (keys.max(2)[:, None] <= last[:, :, None])
    return _visits(jnp.minimum(begin, end), jnp.broadcast_to(end, begin.shape), whole)


def _blocks_of_queries(plan, reach: Ranges, places):
    """For each tile of keys, [B,tiles,4] (:class:`Visits`), from the first block of queries not before it to the last whose first reaches
    its last key.
    """
    reaching = reach.first[:, None, :: plan.block] <= reach.rank[:, TILE - 1 :: TILE, None]
    end = jnp.sum(reaching, axis=2, dtype=jnp.int32)
    begin = jnp.sum(places < jnp.arange(plan.tiles)[:, None], axis=1, dtype=jnp.int32) * (TILE // plan.block)
    first, last = _cut(reach.first, plan.block).max(2), _cut(reach.last, plan.block).min(2)
    keys = _cut(reach.key, TILE)
    whole = (first[:, None] <= keys.min(2)[:, :, None]) & (keys.max(2)[:, :, None] <= last[:, None])
    return _visits(jnp.minimum(begin, end), end, whole)


def _cut(x, length):
    """[B,T] -> [B,T/length,length]."""
    return x.reshape(len(x), -1, length)


def _visits(begin, end, whole):
    """[B,tiles,4] of begin and end [B,tiles] and of which blocks are whole [B,tiles,blocks]: the first run of these."""
    at = jnp.arange(whole.shape[2], dtype=jnp.int32)
    whole &= (begin[:, :, None] <= at) & (at < end[:, :, None])
    first = jnp.min(jnp.where(whole, at, end[:, :, None]), axis=2)
    past = jnp.min(jnp.where(~whole & (at >= first[:, :, None]), at, end[:, :, None]), axis=2)
    return jnp.stack(Visits(begin, first, past, end), axis=2)


def _of_shared_heads(x, group):
    """[B,T,H,K] -> [B,T,H/group,K], summed over the heads that read the same."""
    return x if group == 1 else jnp.sum(x.reshape(*x.shape[:2], -1, group, x.shape[-1]), axis=3, dtype=jnp.float32).astype(x.dtype)
