"""The forward kernel of :mod:`.tpu`: one chunk of a group of heads, each stage for all heads before the next."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.tpu_gates import gates
from pallas_kernels.gated_delta_rule.tpu_inverse import inverses, solve, whole
from pallas_kernels.gated_linear_attention.tpu_decays import as_wide, dot


def kernel(plan, *refs):
    """Blocks of the operands, the results (those for the backward pass may be left out) and the scratch as in ``tpu._forward_call``."""
    q_ref, k_ref, v_ref, gates_ref, initial_ref, *refs = refs
    o_ref, final_ref, *kept_refs, state = refs
    n = pl.program_id(2)
    C, dtype, (K, V) = plan.tokens, v_ref.dtype, state.shape[1:]

    @pl.when(n == 0)
    def _():
        state[...] = initial_ref[0]

    heads = range(plan.heads)
    before = [state[h].astype(dtype) for h in heads]
    of = gates(gates_ref[0, 0], plan.heads, write=False)
    keys, values = ([slice(h * width, (h + 1) * width) for h in heads] for width in (K, V))

    # Rows of queries and of keys, met with the chunk's keys and with the state. Products share operands wherever they can.
    k_columns = [k_ref[0, :, x].T for x in keys]
    rows = [jnp.concatenate([q_ref[0, :, x], k_ref[0, :, x]], axis=0) for x in keys]
    met = [dot(rows[h], jnp.concatenate([k_columns[h], before[h]], axis=1)) for h in heads]
    decays = [of[h].between * of[h].beta for h in heads]
    lower = [met[h][C:, :C] * decays[h] for h in heads]
    inverse = [x.astype(dtype) for x in inverses(lower, dtype)]
    below = [x[C // 2 :, : C // 2].astype(dtype) for x in lower]
    since_start = [as_wide(of[h].since_start, V) for h in heads]
    errors = solve(inverse, below, [v_ref[0, :, values[h]] - since_start[h] * met[h][C:, C:] for h in heads])

    scores = [(met[h][:C, :C] * decays[h]).astype(dtype) for h in heads]
    writes = [(k_columns[h] * (of[h].beta * of[h].until_end)).astype(dtype) for h in heads]
    taken = [dot(jnp.concatenate([scores[h], writes[h]], axis=0), errors[h]) for h in heads]
    for h in heads:
        o_ref[0, :, values[h]] = (plan.scale * (taken[h][:C] + since_start[h] * met[h][:C, C:])).astype(dtype)
        state[h] = of[h].total * state[h] + taken[h][C:]

    if kept_refs:
        states_ref, errors_ref, inverses_ref = kept_refs
        for h, x in enumerate(whole(inverse, below)):
            states_ref[0, 0, h] = before[h]
            errors_ref[0, :, values[h]] = errors[h]
            inverses_ref[0, 0, h] = x

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        final_ref[0] = state[...]
