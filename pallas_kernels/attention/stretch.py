"""Attention on a sequence dealt over devices: see :func:`attention_stretch`."""

import jax
import jax.numpy as jnp

from pallas_kernels import checks, platforms, segments
from pallas_kernels.attention import api, gpu, tpu, xla


def _kernel(*arguments):
    return platforms.kernels(tpu, gpu).attention_stretch(*arguments)


IMPLEMENTATIONS = {"xla": xla.attention_stretch, "pallas": _kernel}


def attention_stretch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """:func:`.attention` inside ``jax.shard_map``, each device along ``axis_name`` with a stretch of the sequence, in order.

    q, k, v, segment_ids: of the device's stretch. Every device gathers the keys and values of all: B T HK (K + V) numbers for a row of T.
    implementation: "xla", "pallas" (on TPU without windows that padding may be in; on Hopper GPUs for bfloat16 and heads of 128 at most),
        or None for the one of the platform.
    Returns the output of the stretch.
    """
    sizes = api.check(q, k, v, window, segment_ids)
    (B, T), scale = q.shape[:2], sizes["K"] ** -0.5 if scale is None else scale
    kernels = platforms.kernels(tpu, gpu)
    end = [(0, 0), (0, -T % kernels.block_length(T))]  # whole blocks a device, so that a block of queries meets blocks of keys as on one
    unfit = kernels is tpu and window is not None and (segment_ids is not None or end[1][1] > 0)
    if implementation == "pallas" and unfit:
        raise ValueError(f"attention: windows over padding, and {T} tokens are not whole blocks, take implementation='xla' or None")
    kernel = "pallas" if kernels.is_faster(q, k, v) and not unfit else None
    run = checks.choose("attention", IMPLEMENTATIONS, implementation, default="xla", kernel=kernel)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    ids = jnp.pad(ids, end)
    q, k, v = (jnp.where((ids != 0)[:, :, None, None], jnp.pad(a, [*end, (0, 0), (0, 0)]), 0) for a in (q, k, v))
    k, v, ids = (jax.lax.all_gather(a, axis_name, axis=1, tiled=True) for a in (k, v, ids))
    output = run(q, k, v, scale, window, segments.number(ids), jax.lax.axis_index(axis_name))
    return output[:, :T].astype(v.dtype)
