"""Gated linear attention on a sequence dealt over devices: see :func:`gated_linear_attention_stretch`."""

import jax
import jax.numpy as jnp

from pallas_kernels import segments, stretches
from pallas_kernels.gated_linear_attention import api
from pallas_kernels.gated_linear_attention.associative_scan import then


def gated_linear_attention_stretch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    axis_name: str,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`.gated_linear_attention` inside ``jax.shard_map``, each device along ``axis_name`` with a stretch of the sequence, in order.

    q, k, v, log_decay, segment_ids: of the device's stretch; initial_state: before the first one, the same on all devices.
    Returns (o of the stretch, the final state of the last one, on all devices). A stretch's summary, its total decay and the state it
    comes to from zero, goes from device to device: 4 B HV (K V + K) bytes, a decay a head 4 B HV (K V + 1), in each of
    log2(devices) + 1 rounds, forward and backward.
    """
    total, increment = _summary(k, v, log_decay, segment_ids)
    before = stretches.state_before(then, total, increment, initial_state, segment_ids, axis_name)
    options = dict(scale=scale, segment_ids=segment_ids, implementation=implementation)
    o, after = api.gated_linear_attention(q, k, v, log_decay, initial_state=before, **options)
    return o, stretches.last(after, axis_name)


def _summary(k, v, log_decay, segment_ids):
    """The total decay [B,HV,K], or [B,HV,1] where it is one a head, and the state [B,HV,K,V] that a stretch comes to from zero."""
    dtype = jnp.result_type(jnp.float32, k, v, log_decay)
    B, T, HV = v.shape[:3]
    decays = jnp.broadcast_to(log_decay, (B, T, HV)) if log_decay.ndim == 1 else log_decay
    decays = decays.astype(dtype).reshape(B, T, HV, -1)
    numbered = segments.one_segment(B, T) if segment_ids is None else segments.number(segment_ids)
    if segment_ids is not None:
        k, v, decays = (jnp.where(numbered.real[:, :, None, None], a, 0) for a in (k, v, decays))
    following = jnp.pad(decays[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)])
    until_end = jnp.exp(jax.lax.cumsum(following, axis=1, reverse=True))
    total = until_end[:, 0] * jnp.exp(decays[:, 0])
    k = jnp.repeat(k, HV // k.shape[2], axis=2).astype(dtype) * until_end
    if segment_ids is not None:  # the last document is all that remains
        index = numbered.index
        k = jnp.where((index == index[:, -1:])[:, :, None, None], k, 0)
        total = jnp.where((index[:, -1] == 0)[:, None, None], total, 0)
    return total, jnp.einsum("bthk,bthv->bhkv", k, v.astype(dtype))
