"""Attention on TPU by JAX's own Splash Attention kernel, fitted to this package's contract.

Splash knows segments by an id a token and windows by positions. Padding here is a segment of its own, whose output is dropped,
and holds zeros, as nothing times a masked weight of zero may be nan. Windows count real tokens only: where there are both, real
tokens are moved together first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from pallas_kernels import checks, kept, platforms
from pallas_kernels.attention.reach import blocks_at, stretches
from pallas_kernels.segments import Segments

LANES = 128
# By the schedules of all generations (docs/tpu.md): the largest blocks that leave room in VMEM, softmax over half of one at a time.
LARGEST_BLOCK = 1024
LARGEST_COMPUTED = 512
# One kernel for all gradients writes dq once for each block of keys, for another to add up: worth it up to so many.
MOST_PARTIAL_DQ = 8


def is_faster(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether this kernel is the fastest on TPU for such arrays."""
    return all(a.dtype in checks.KERNEL_DTYPES for a in (q, k, v))


def attention(q, k, v, scale, window, segments: Segments | None):
    """Splash attention; see api.py. Raises ValueError for dtypes other than float32 and bfloat16."""
    checks.check_kernel_dtypes("attention", q=q, k=k, v=v)
    if segments is None:
        return _attend(q, k, v, scale, window, None)
    index, real = segments
    q, k, v = (jnp.where(real[:, :, None, None], a, 0) for a in (q, k, v))
    ids = jnp.where(real, index, -1)
    if window is None:
        output = _attend(q, k, v, scale, None, ids)
    else:
        order = jnp.argsort(~real, axis=1, stable=True)  # real tokens first, in their order
        together = [jnp.take_along_axis(a, order[:, :, None, None], axis=1) for a in (q, k, v)]
        output = _attend(*together, scale, window, jnp.take_along_axis(ids, order, axis=1))
        output = jnp.take_along_axis(output, jnp.argsort(order, axis=1)[:, :, None, None], axis=1)
    return jnp.where(real[:, :, None, None], output, 0)


def attention_stretch(q, k, v, scale, window, segments: Segments, places):
    """The queries of some of equal stretches, whole blocks of :func:`block_length`, against the keys of all; see stretch.py.

    Windows count padding like any token.
    """
    T = q.shape[1] // len(places)
    ids = jnp.where(segments.real, segments.index, -1)

    def kernel(places, heads, interpret):
        return _stretch_kernel(heads, T, k.shape[1], window, places, interpret)

    return _splash(kernel, places, q, k, v, scale, (stretches(ids, places, T), ids))


def _attend(q, k, v, scale, window, ids):
    """[B,T,H,V] of q [B,T,H,K], k, v [B,T,HK,...]; ids [B,T], unequal where a query must not see a key, or None."""
    T = q.shape[1]
    end = [(0, 0), (0, -T % block_length(T))]
    q, k, v = (jnp.pad(a, [*end, (0, 0), (0, 0)]) for a in (q, k, v))
    ids = () if ids is None else (jnp.pad(ids, end, constant_values=-1),) * 2

    def kernel(_, heads, interpret):
        return _kernel(heads, q.shape[1], window, block_length(T), interpret)

    return _splash(kernel, jnp.zeros((1,), jnp.int32), q, k, v, scale, ids)[:, :T]


def _splash(kernel, places, q, k, v, scale, ids):
    """``kernel`` (places, heads, interpret) on whole blocks, [B,T,H,...] in and out; ids: () or those of queries and of keys."""

    def run(places, q, k, v, *ids, interpret):
        documents = [splash.SegmentIds(*ids)] if ids else []
        return jax.vmap(kernel(places, q.shape[1], interpret))(q, k, v, *documents)

    heads_first = (a.swapaxes(1, 2) for a in (q * jnp.asarray(scale, q.dtype), k, v))
    return platforms.kernel("splash_attention", run)(places, *heads_first, *ids).swapaxes(1, 2).astype(v.dtype)


def block_length(T: int) -> int:
    """Tokens a block: no more than needed for as few blocks as the limit allows; LARGEST_COMPUTED or less, or twice whole lanes."""
    blocks = -(-T // LARGEST_BLOCK)
    unit = LANES if T <= LARGEST_COMPUTED else 2 * LANES
    return -(-T // (blocks * unit)) * unit


def _kernel(heads, length, window, block, interpret):
    if window is None:
        mask = splash.CausalMask((length, length))
    else:
        mask = splash.LocalMask((length, length), (window - 1, 0), offset=0)
    sizes = _block_sizes(block, fused=length <= MOST_PARTIAL_DQ * block)
    named = dict(residual_checkpoint_name=kept.ATTENTION, interpret=interpret)
    return splash.make_splash_mha_single_device(splash.MultiHeadMask([mask] * heads), block_sizes=sizes, **named)


def _stretch_kernel(heads, length, keys, window, places, interpret):
    """Of stretches of ``length`` queries. Splash makes its own tables block by block beforehand; these are made where places are known."""
    block = block_length(length)
    i, j = blocks_at(places, length // block)[:, None], jnp.arange(keys // block)
    allowed = [lambda query, key: query >= key]
    runs, whole = j <= i, j < i
    if window is not None:
        allowed.append(lambda query, key: query - key < window)
        runs &= (i - j - 1) * block + 1 < window  # of the closest pair in the two blocks
        whole &= (i - j + 1) * block - 1 < window  # of the farthest
    kinds = jnp.where(whole, 2, jnp.where(runs, 1, 0)).astype(jnp.int8)
    positions = blocks_at(places, length)

    def tables(runs, fetched):
        """What is fetched for a block that is passed over: the first of the next row that is not, to be there in time."""
        coming = jnp.roll(jnp.argmax(runs, axis=1), -1)[:, None]
        earlier = jnp.argmax(runs, axis=1)[:, None]
        return jnp.where(runs, fetched, jnp.where(fetched < earlier, earlier, coming)).astype(jnp.int16)

    def info(data_next):
        return mask_info.MaskInfo(data_next[None], None, kinds[None], None, positions)

    by_query = info(tables(runs, j[None]))
    by_key = info(tables(runs.T, jnp.arange(len(i))[None]).T)
    sizes = _block_sizes(block, fused=keys <= MOST_PARTIAL_DQ * block)
    return splash_kernel.SplashAttentionKernel(
        by_query,
        None if sizes.use_fused_bwd_kernel else by_query,
        by_key,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=kept.ATTENTION,
        mask_function=lambda query, key: functools.reduce(jnp.logical_and, (test(query, key) for test in allowed)),
        interpret=interpret,
    )


def _block_sizes(block: int, fused: bool) -> splash.BlockSizes:
    computed = block if block <= LARGEST_COMPUTED else block // 2
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=computed,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=computed,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
