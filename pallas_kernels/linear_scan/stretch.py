"""The gated elementwise recurrence of a sequence dealt over devices: see :func:`linear_scan_stretch`."""

import jax
import jax.numpy as jnp

from pallas_kernels import stretches
from pallas_kernels.linear_scan import api


def linear_scan_stretch(
    decay: jax.Array,
    x: jax.Array,
    *,
    axis_name: str,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`.linear_scan` inside ``jax.shard_map``, each device along ``axis_name`` with a stretch of the sequence, in order.

    decay, x, segment_ids: of the device's stretch; initial_state: before the first one, the same on all devices.
    Returns (h of the stretch, the final state of the last one, on all devices). A stretch's summary, the product of its decays and the
    state it comes to from zero, goes from device to device: 8 B D bytes in each of log2(devices) + 1 rounds, forward and backward.
    """
    numbered, real = api.with_documents(decay, x, segment_ids)
    dtype = jnp.result_type(decay, x, jnp.float32)
    _, increment = api.linear_scan(*numbered, implementation=implementation)
    total = jnp.prod(numbered[0].astype(dtype), axis=1)
    before = stretches.state_before(_then, total, increment, initial_state, segment_ids, axis_name)
    h, after = api.linear_scan(*numbered, initial_state=before, implementation=implementation)
    return h if real is None else jnp.where(real, h, 0), stretches.last(after, axis_name)


def _then(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]
