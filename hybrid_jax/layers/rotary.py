"""Rotary position embedding (Su et al., 2021), halves rotated together (NeoX)."""

import jax
import jax.numpy as jnp

from pallas_kernels import segments


def positions(B: int, T: int, segment_ids: jax.Array | None) -> jax.Array:
    """[B,T] int32: each token's place in its own document, padding not counted."""
    if segment_ids is None:
        return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    index, real = segments.number(segment_ids)
    before = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real  # real tokens so far in the row
    starts = jnp.pad(index[:, 1:] != index[:, :-1], [(0, 0), (1, 0)])
    return before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotate x [B,T,H,K] or [B,T,K] by its tokens' positions [B,T], frequency theta^(-2i/K) for the i-th pair (x_i, x_{i+K/2})."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.expand_dims(positions, range(2, x.ndim)).astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
