"""Normalisations, computed in float32 whatever the compute dtype."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * w over the last axis, optionally times an activated gate; output in x's dtype.

    ``scale=False`` leaves w out; ``activation`` is the gate's, "silu" or "sigmoid".
    """

    def __init__(self, width: int, eps: float, *, scale: bool = True, activation: str = "silu"):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,)) if scale else None
        self.eps = eps
        self.activation = getattr(jax.nn, activation)

    def __call__(self, x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale[...]
        if gate is not None:
            y = y * self.activation(gate.astype(jnp.float32))
        return y.astype(x.dtype)


def l2_normalize(x: jax.Array) -> jax.Array:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis; output in x's dtype."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
