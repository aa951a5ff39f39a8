"""The short convolution of a sequence dealt over devices: see :func:`causal_conv_stretch`."""

import jax
import jax.numpy as jnp

from pallas_kernels import segments, stretches
from pallas_kernels.causal_conv import api


def causal_conv_stretch(
    x: jax.Array,
    weight: jax.Array,
    *,
    axis_name: str,
    activation: str | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`.causal_conv` inside ``jax.shard_map``, each device along ``axis_name`` with a stretch of the sequence, in order.

    x, segment_ids: of the device's stretch; weight the same on all devices, as is initial_state, from before the first stretch.
    Returns (output of the stretch, the final state of the last one, on all devices). The last W-1 inputs go from device to device, in
    log2(devices) + 1 rounds as a stretch of padding may hold fewer: 4 B (W-1) D bytes each, forward and backward.
    """
    (B, T), taps = x.shape[:2], weight.shape[1] - 1
    options = dict(activation=activation, segment_ids=segment_ids, implementation=implementation)
    if taps == 0:
        return api.causal_conv(x, weight, initial_state=initial_state, **options)
    numbered = segments.one_segment(B, T) if segment_ids is None else segments.number(segment_ids)
    _, tail = api.causal_conv(x, weight, **options)  # the output is not computed
    own = jnp.sum(numbered.real & (numbered.index == numbered.index[:, -1:]), axis=1)
    # How many of the inputs before the stretch are still among the last when it ends.
    left = jnp.where(numbered.index[:, -1] == 0, jnp.maximum(taps - own, 0), 0)
    before = stretches.state_before(_then, left, tail, initial_state, segment_ids, axis_name)
    y, after = api.causal_conv(x, weight, initial_state=before, **options)
    return y, stretches.last(after, axis_name)


def _then(first, second):
    """Of two stretches in a row: how many [B] of the inputs before both are left at the end of both, and their last inputs [B,W-1,D]."""
    (left1, tail1), (left2, tail2) = first, second
    taps = tail1.shape[1]
    place = jnp.arange(taps)[None, :, None]
    # The last ``left2`` inputs of the first come before those of the second, which fill the rest.
    shifted = jnp.take_along_axis(tail1, jnp.minimum(place + taps - left2[:, None, None], taps - 1), axis=1)
    return jnp.maximum(left1 + left2 - taps, 0), jnp.where(place < left2[:, None, None], shifted, tail2)
