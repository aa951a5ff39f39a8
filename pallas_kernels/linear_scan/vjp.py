"""The gradient of h_t = a_t * h_{t-1} + x_t is the same recurrence run backwards, whatever runs it.

With e_t = dL/dh_t through output and final state together:

    e_t = dh_t + a_{t+1} e_{t+1},   dx_t = e_t,   da_t = e_t * h_{t-1},   dh_0 = a_1 e_1
"""
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

# (decay, x [B,T,D], initial_state [B,D], reverse) -> h [B,T,D]; where reverse, from the last token to the first.
Recurrence = Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve(run: Recurrence, decay: jax.Array, x: jax.Array, initial_state: jax.Array) -> jax.Array:
    """All h [B,T,D] of decay, x [B,T,D] and initial_state [B,D]; keeps its inputs and its output for the gradient."""
    return run(decay, x, initial_state, False)


def _forward(run, decay, x, initial_state):
    h = run(decay, x, initial_state, False)
    return h, (decay, initial_state, h)


def _backward(run, residuals, dh):
    decay, initial_state, h = residuals
    following = jnp.pad(decay[:, 1:], [(0, 0), (0, 1), (0, 0)])
    dx = run(following, dh, jnp.zeros_like(initial_state), True)
    previous = jnp.concatenate([initial_state[:, None], h[:, :-1]], axis=1)
    return dx * previous, dx, decay[:, 0] * dx[:, 0]


solve.defvjp(_forward, _backward)
