"""The gated delta rule on a sequence dealt over devices: see :func:`gated_delta_rule_stretch`."""

import jax
import jax.numpy as jnp

from pallas_kernels import stretches
from pallas_kernels.gated_delta_rule import api
from pallas_kernels.gated_delta_rule.associative_scan import then


def gated_delta_rule_stretch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    axis_name: str,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`.gated_delta_rule` inside ``jax.shard_map``, each device along ``axis_name`` with a stretch of the sequence, in order.

    q, k, v, beta, log_decay, segment_ids: of the device's stretch; initial_state: before the first one, the same on all devices.
    Returns (output of the stretch, the final state of the last one, on all devices). A stretch's summary, its transition and the state it
    comes to from zero, goes from device to device: 4 B HV K (K + V) bytes in each of log2(devices) + 1 rounds, forward and backward.

    The rule is linear in its state: run on no values from the identity, it comes to the transition M = P_T, and its outputs are
    scale * P_t^T q_t, P_t being the transition up to token t, which is what a state S that came from before adds to, (P_t S)^T q_t.
    """
    (B, T, HV), K = v.shape[:3], k.shape[-1]
    options = dict(log_decay=log_decay, scale=scale, segment_ids=segment_ids, implementation=implementation)
    output, increment = api.gated_delta_rule(q, k, v, beta, **options)
    identity = jnp.broadcast_to(jnp.eye(K, dtype=increment.dtype), (B, HV, K, K))
    reads, transition = api.gated_delta_rule(q, k, jnp.zeros_like(v, shape=(B, T, HV, K)), beta, initial_state=identity, **options)
    before = stretches.state_before(then, transition, increment, initial_state, segment_ids, axis_name)
    earlier = jnp.einsum("bthk,bhkv->bthv", reads, before.astype(reads.dtype), preferred_element_type=increment.dtype)
    output = (output.astype(increment.dtype) + earlier).astype(v.dtype)
    return output, stretches.last(transition @ before + increment, axis_name)
