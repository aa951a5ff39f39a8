"""Attention on Hopper GPUs: cuDNN's where a row is one document, and else kernels that know documents, padding and windows.

The kernels (:mod:`.gpu_kernels`) are FlashAttention in the form of Shah et al. 2024 without its overlap of softmax and products: two
warpgroups compute, one loads. Blocks that no query of a tile reaches are not visited, so that packed documents cost what they are, and
tiles are dealt out over the multiprocessors by what they cost (:mod:`.gpu_schedule`).
Rows are padded to whole tiles and heads to multiples of 64 channels, with zeros.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kept, platforms
from pallas_kernels.attention import gpu_kernels, gpu_schedule
from pallas_kernels.attention.gpu_kernels import ROWS, STAGES, WARPGROUPS, numbers, tokens
from pallas_kernels.attention.gpu_schedule import TILE
from pallas_kernels.attention.reach import Ranges, blocks_at, ranges, ranges_of_whole_rows
from pallas_kernels.segments import Segments

SHARED_BYTES = 225 * 1024  # that a program's scratch may have: all that there is but 2 KB, for barriers and what lies between its parts
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
    """Of one kernel. block: tokens of the other side at a time; group: H / HK; keys, values: K and V."""

    scale: float
    block: int
    group: int
    keys: int
    values: int

    @classmethod
    def of(cls, scale, q, k, v, block: int) -> "Plan":
        return cls(scale, block, q.shape[2] // k.shape[2], k.shape[3], v.shape[3])

    def call(self, body, operands, results, *, own, streamed, made=()):
        """operands: with "items" :func:`.dealt`; own: a function of how many, the scratch of so many half tiles that are loaded; made:
        that of those stored; streamed: that of the blocks that go by.
        """
        items = operands["items"]
        rest = [*made, *streamed]
        halves = next(n for n in (2 * WARPGROUPS, WARPGROUPS) if _bytes([*own(n), *rest]) <= SHARED_BYTES)
        barriers = (
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=len(own(halves)), num_barriers=halves),
        )
        return platforms.gpu_call(
            partial(body, self),
            name=f"attention_{body.__name__}",
            out_type=results,
            grid=(items.shape[0],),
            grid_names=("program",),
            num_threads=WARPGROUPS + 1,
            thread_name="wg",
            scratch_types=[scratch for scratch in (own(halves), list(made), streamed, barriers) if scratch],
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(*operands.values())


def _bytes(scratch):
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in scratch)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, reach: Ranges, places):
    """q [B,T,H,K], k [B,S,HK,K], v [B,S,HK,V], T and S whole tiles, K and V multiples of 64 -> [B,T,H,V].

    places: [T/TILE] int32, ascending: which tile of the row each tile of queries is.
    """
    return _forward(scale, q, k, v, reach, places)[0]


def _forward(scale, q, k, v, reach, places):
    """(output [B,T,H,V], the logsumexp [B,H,T] of base-2 logarithms)."""
    plan = Plan.of(scale, q, k, v, block=TILE)
    B, T, H, K = q.shape
    return plan.call(
        gpu_kernels.of_queries,
        {"q": q, "k": k, "v": v} | _reached(reach) | {"items": _dealt(gpu_schedule.blocks_of_keys(plan.block, reach, places), H)},
        (jax.ShapeDtypeStruct((B, T, H, plan.values), v.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        own=lambda n: [tokens(ROWS, K, n), *[numbers(ROWS, jnp.int32, n)] * 2],
        made=[tokens(ROWS, plan.values, WARPGROUPS), numbers(ROWS, jnp.float32, WARPGROUPS)],
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

    def call(body, plan, visits, results, **scratch):
        operands = {"q": q, "k": k, "v": v, "d_output": d_output} | _reached(reach)
        return plan.call(body, operands | {"items": _dealt(visits, H), "logsumexp": logsumexp, "mean": mean}, results, **scratch)

    plan = Plan.of(scale, q, k, v, block=TILE if max(K, v.shape[3]) <= 64 else ROWS)  # what fits in registers
    (dq,) = call(
        gpu_kernels.d_queries,
        plan,
        gpu_schedule.blocks_of_keys(plan.block, reach, places),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        own=lambda n: _queries(plan, n),
        streamed=_keys_and_values(plan),
    )

    plan = Plan.of(scale, q, k, v, block=ROWS)
    dk, dv = call(
        gpu_kernels.d_keys,
        plan,
        gpu_schedule.blocks_of_queries(plan.block, reach, places),
        tuple(jax.ShapeDtypeStruct((B, S, H, width), q.dtype) for width in (K, plan.values)),
        own=lambda n: [tokens(ROWS, K, n), tokens(ROWS, plan.values, n), numbers(ROWS, jnp.int32, n)],
        streamed=_queries(plan, STAGES),
    )
    return dq, _of_shared_heads(dk, plan.group), _of_shared_heads(dv, plan.group), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _reached(reach: Ranges):
    return {"first": reach.first, "count": reach.reached, "key": reach.key}


def _dealt(visits, heads):
    return gpu_schedule.dealt(visits, heads, platforms.multiprocessors())


def _keys_and_values(plan):
    return [tokens(plan.block, plan.keys, STAGES), tokens(plan.block, plan.values, STAGES), numbers(plan.block, jnp.int32, STAGES)]


def _queries(plan, n):
    """So many times ROWS of q, d_output, first, count, logsumexp and mean."""
    of_each = *[numbers(ROWS, jnp.int32, n)] * 2, *[numbers(ROWS, jnp.float32, n)] * 2
    return [tokens(ROWS, plan.keys, n), tokens(ROWS, plan.values, n), *of_each]


def _of_shared_heads(x, group):
    """[B,T,H,K] -> [B,T,H/group,K], summed over the heads that read the same."""
    return x if group == 1 else jnp.sum(x.reshape(*x.shape[:2], -1, group, x.shape[-1]), axis=3, dtype=jnp.float32).astype(x.dtype)
