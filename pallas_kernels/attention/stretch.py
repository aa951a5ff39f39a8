"""Attention on a sequence dealt over devices: see :func:`attention_stretch`.

Of the later stretch's queries each meets more keys. So halves of stretches are exchanged: of 2 n halves the i-th of n devices computes the
i-th and the i-th from the end, which is the same work for all.
"""

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

    q, k, v, segment_ids: of the device's stretch. Every device gathers the keys and values of all, B T HK (K + V) numbers for a row of T,
        and sends its queries on, and gets the output back, where another has less to do.
    implementation: "xla", "pallas" (on TPU without windows that padding may be in; on Hopper GPUs for bfloat16 and heads of 128 at most),
        or None for the one of the platform.
    Returns the output of the stretch.
    """
    sizes = api.check(q, k, v, window, segment_ids)
    (B, T), scale = q.shape[:2], sizes["K"] ** -0.5 if scale is None else scale
    kernels = platforms.kernels(tpu, gpu)
    # Whole blocks in half a stretch, so that a block of queries meets blocks of keys as on one device.
    end = [(0, 0), (0, -T % (2 * kernels.block_length(-(-T // 2))))]
    unfit = kernels is tpu and window is not None and (segment_ids is not None or end[1][1] > 0)
    if implementation == "pallas" and unfit:
        raise ValueError(f"attention: windows over padding, and {T} tokens are not twice whole blocks, take implementation='xla' or None")
    kernel = "pallas" if kernels.is_faster(q, k, v) and not unfit else None
    run = checks.choose("attention", IMPLEMENTATIONS, implementation, default="xla", kernel=kernel)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    ids = jnp.pad(ids, end)
    q, k, v = (jnp.where((ids != 0)[:, :, None, None], jnp.pad(a, [*end, (0, 0), (0, 0)]), 0) for a in (q, k, v))
    k, v, ids = (jax.lax.all_gather(a, axis_name, axis=1, tiled=True) for a in (k, v, ids))
    at, devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    places = jnp.stack([at, 2 * devices - 1 - at])
    output = run(_to_both_ends(q, axis_name), k, v, scale, window, segments.number(ids), places)
    return _from_both_ends(output, axis_name)[:, :T].astype(v.dtype)


def routes(devices: int) -> tuple[list[tuple[int, int]], ...]:
    """(from, to) of the first half of each device's stretch, and of the second: the i-th half and the i-th from the end meet."""
    return tuple([(i, min(half, 2 * devices - 1 - half)) for i, half in enumerate(range(first, 2 * devices, 2))] for first in (0, 1))


def _to_both_ends(x, axis_name):
    """[B,T,...] of this device's stretch -> of the halves that it computes, in their order."""
    halves = zip(jnp.split(x, 2, axis=1), routes(jax.lax.axis_size(axis_name)), strict=True)
    return _in_order([jax.lax.ppermute(half, axis_name, route) for half, route in halves], axis_name)


def _from_both_ends(x, axis_name):
    """[B,T,...] of the halves that this device computes -> of its stretch."""
    back = ([(source, target) for target, source in route] for route in routes(jax.lax.axis_size(axis_name)))
    halves = jnp.split(_in_order(jnp.split(x, 2, axis=1), axis_name), 2, axis=1)
    return jnp.concatenate([jax.lax.ppermute(half, axis_name, route) for half, route in zip(halves, back, strict=True)], axis=1)


def _in_order(halves, axis_name):
    """Both, the other one first on devices of odd places: they get the later by the first of :func:`routes`."""
    swapped = jax.lax.axis_index(axis_name) % 2 == 1
    first, second = halves
    return jnp.concatenate([jnp.where(swapped, second, first), jnp.where(swapped, first, second)], axis=1)
