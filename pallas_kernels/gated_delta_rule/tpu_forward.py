"""The forward kernel of :mod:`.tpu`: one chunk of a group of heads, each stage for all heads before the next."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.tpu_inverse import inverses
from pallas_kernels.gated_linear_attention.tpu import LANES
from pallas_kernels.gated_linear_attention.tpu import _as_wide as as_wide
from pallas_kernels.gated_linear_attention.tpu import _decays as decays_of
from pallas_kernels.gated_linear_attention.tpu import _dot as dot


def kernel(plan, q_ref, k_ref, v_ref, gates_ref, initial_ref, o_ref, final_ref, states_ref, updates_ref, inverses_ref, state):
    """Blocks of q, k [1,C,G K], v [1,C,G V], gates [1,1,3G,C] (:func:`gates_of`) and states; outputs as in ``tpu._forward_call``."""
    n = pl.program_id(2)
    dtype, (K, V) = v_ref.dtype, state.shape[1:]

    @pl.when(n == 0)
    def _():
        state[...] = initial_ref[0]

    states_ref[0, 0] = state[...].astype(dtype)
    heads = range(plan.heads)
    beta, decays = gates_of(gates_ref[0, 0])
    keys, values = ([slice(h * width, (h + 1) * width) for h in heads] for width in (K, V))
    q, k = [q_ref[0, :, x] for x in keys], [k_ref[0, :, x] for x in keys]
    k_columns = [x.T for x in k]
    earlier = strictly_lower(plan.tokens)

    pairs = [dot(k[h], k_columns[h]) for h in heads]
    pairs = [jnp.where(earlier, as_wide(beta[h], plan.tokens) * decays[h].between * pairs[h], 0) for h in heads]
    inverse = [x.astype(dtype) for x in inverses(pairs, dtype)]
    met = [dot(k[h], states_ref[0, 0, h]) for h in heads]
    errors = [v_ref[0, :, values[h]] - as_wide(decays[h].since_start, V) * met[h] for h in heads]
    updates = [dot(inverse[h], (as_wide(beta[h], V) * errors[h]).astype(dtype)).astype(dtype) for h in heads]

    reads = [(q[h] * as_wide(decays[h].since_start, K)).astype(dtype) for h in heads]
    scores = [(dot(q[h], k_columns[h]) * decays[h].between).astype(dtype) for h in heads]
    o = [dot(scores[h], updates[h]) + dot(reads[h], states_ref[0, 0, h]) for h in heads]
    writes = [(k_columns[h] * decays[h].across).astype(dtype) for h in heads]
    written = [dot(writes[h], updates[h]) for h in heads]
    for h in heads:
        o_ref[0, :, values[h]] = (plan.scale * o[h]).astype(dtype)
        updates_ref[0, :, values[h]] = updates[h]
        inverses_ref[0, 0, h] = inverse[h]
        state[h] = decays[h].total * state[h] + written[h]

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        final_ref[0] = state[...]


def gates_of(gates: jax.Array):
    """[3G,C], the heads' beta above the two parts of their running sums -> beta in all lanes [C,128] and the decays, of each head."""
    G, C = gates.shape[0] // 3, gates.shape[1]
    columns = gates.T
    beta = [jnp.broadcast_to(columns[:, h : h + 1], (C, LANES)) for h in range(G)]
    return beta, decays_of(gates[G:])


def strictly_lower(C: int) -> jax.Array:
    """[C,C] bool, j < i."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return i > j
