"""Gates in float32: what a state forgets, in log space, and how strongly it is written to."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


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


def initial_decay(heads: int, channels: int, least: float, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    """A_log [heads] and dt_bias [channels] of g = -exp(A_log) softplus(. + dt_bias), as Mamba-2 draws them (arXiv 2405.21060).

    exp(A_log) ~ U(least, 16), softplus(dt_bias) ~ log U(1e-3, 1e-1).
    """
    A = jax.random.uniform(rngs.params(), (heads,), minval=max(least, jnp.finfo(jnp.float32).tiny), maxval=16.0)
    dt = jnp.exp(jax.random.uniform(rngs.params(), (channels,), minval=math.log(1e-3), maxval=math.log(1e-1)))
    return jnp.log(A), dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus


def write_strength(logits: jax.Array, negative_eigenvalues: bool) -> jax.Array:
    """beta of a delta rule, float32: sigmoid(logits), or twice that, so that I - beta k k^T may turn what is at k around."""
    beta = jax.nn.sigmoid(logits.astype(jnp.float32))
    return 2 * beta if negative_eigenvalues else beta
