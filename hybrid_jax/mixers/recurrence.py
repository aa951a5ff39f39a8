"""How a mixer runs its recurrence: over a sequence, in chunks, or one token at a time."""

import jax

from hybrid_jax.mixers.context import Context
from hybrid_jax.sharding import on_each_device
from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from pallas_kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from pallas_kernels.linear_scan import linear_scan, linear_scan_step

STEPS = {
    linear_scan: linear_scan_step,
    gated_linear_attention: gated_linear_attention_step,
    gated_delta_rule: gated_delta_rule_step,
}


def recur(
    operator, *inputs: jax.Array, context: Context, state: jax.Array | None, **gates: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """``operator`` on ``inputs`` and on ``gates`` by name, going on from ``state``: its output, and its state after them.

    inputs, gates: [B,T,...], or of one axis where they are the same at every token; gates: None too.
    """
    T = inputs[0].shape[1]
    if state is not None and context.segment_ids is None and T == 1:
        now = {name: _token(x) for name, x in gates.items()}
        output, state = STEPS[operator](*map(_token, inputs), state=state, **now)
        return output[:, None], state
    return on_each_device(operator, *inputs, initial_state=state, segment_ids=context.segment_ids, **gates)


def _token(x: jax.Array | None) -> jax.Array | None:
    return x if x is None or x.ndim == 1 else x[:, 0]
