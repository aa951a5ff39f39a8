"""h_t = a_t * h_{t-1} + x_t, token by token: slow, plainly right, what the others are tested against."""
import jax
import jax.numpy as jnp


def linear_scan(decay: jax.Array, x: jax.Array, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """decay, x [B,T,D] and initial_state [B,D] of one dtype -> (h [B,T,D], final state [B,D])."""

    def step(h, token):
        decay, x = token
        h = decay * h + x
        return h, h

    final_state, h = jax.lax.scan(step, initial_state, (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(x, 1, 0)))
    return jnp.moveaxis(h, 0, 1), final_state
