"""Forget gates kept in log space."""

import jax
import jax.numpy as jnp


def lower_bounds(logits: jax.Array) -> jax.Array:
    """[L,D] -> [L,D]: each layer's least forget gate, cumsum(softmax over layers) less its first row: 0 at layer 0, then rising."""
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=0)
    return jnp.cumsum(shares, axis=0) - shares[0]


def bounded_log_sigmoid(f: jax.Array, bound: jax.Array | None) -> jax.Array:
    """log(bound + (1 - bound) sigmoid(f)) in float32, exact where the sigmoid underflows; bound in [0, 1), 0 included (None: 0)."""
    log_gate = jax.nn.log_sigmoid(f.astype(jnp.float32))
    if bound is None:
        return log_gate
    positive = jnp.where(bound > 0, bound, 0.5)  # keeps log(0), and its gradient, out of the branch not taken
    bounded = jnp.logaddexp(jnp.log(positive), jnp.log1p(-positive) + log_gate)
    return jnp.where(bound > 0, bounded, log_gate)
