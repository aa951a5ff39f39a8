"""Attention on TPU by JAX's own Splash Attention kernel, fitted to this package's contract.

Splash knows segments by an id a token and windows by positions. Padding here is a segment of its own, whose output is dropped,
and holds zeros, as nothing times a masked weight of zero may be nan. Windows count real tokens only: where there are both, real
tokens are moved together first.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from pallas_kernels import checks, platforms
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


def _attend(q, k, v, scale, window, ids):
    """[B,T,H,V] of q [B,T,H,K], k, v [B,T,HK,...]; ids [B,T], unequal where a query must not see a key, or None."""
    T = q.shape[1]
    block = _block(T)
    end = [(0, 0), (0, -T % block)]
    q, k, v = (jnp.pad(a, [*end, (0, 0), (0, 0)]).swapaxes(1, 2) for a in (q * jnp.asarray(scale, q.dtype), k, v))
    arrays = (q, k, v) if ids is None else (q, k, v, jnp.pad(ids, end, constant_values=-1))

    def run(q, k, v, *ids, interpret):
        documents = [splash.SegmentIds(i, i) for i in ids]
        return jax.vmap(_kernel(q.shape[1], q.shape[2], window, block, interpret))(q, k, v, *documents)

    return platforms.kernel("splash_attention", run)(*arrays).swapaxes(1, 2)[:, :T].astype(v.dtype)


def _block(T: int) -> int:
    """Tokens a block: no more than needed for as few blocks as the limit allows; LARGEST_COMPUTED or less, or twice whole lanes."""
    blocks = -(-T // LARGEST_BLOCK)
    unit = LANES if T <= LARGEST_COMPUTED else 2 * LANES
    return -(-T // (blocks * unit)) * unit


def _kernel(heads, length, window, block, interpret):
    if window is None:
        mask = splash.CausalMask((length, length))
    else:
        mask = splash.LocalMask((length, length), (window - 1, 0), offset=0)
    computed = block if block <= LARGEST_COMPUTED else block // 2
    fused = length <= MOST_PARTIAL_DQ * block
    sizes = splash.BlockSizes(
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
    return splash.make_splash_mha_single_device(splash.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret)
