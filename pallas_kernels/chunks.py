"""Cutting the time axis into chunks, the first and last thing every chunked operator does."""
import jax
import jax.numpy as jnp


def split(x: jax.Array, length: int) -> jax.Array:
    """[B,T,H,...] -> [N,B,H,C,...]: chunks of C = ``length`` tokens in front, ready for ``lax.scan``; T is padded with zeros."""
    B, T, H = x.shape[:3]
    N = -(-T // length)
    x = jnp.pad(x, [(0, 0), (0, N * length - T)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(B, N, length, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def join(x: jax.Array, T: int) -> jax.Array:
    """[N,B,H,C,...] -> [B,T,H,...]: the inverse of :func:`split`, the padding cut off."""
    x = jnp.moveaxis(jnp.moveaxis(x, 2, 3), 0, 1)
    B, N, C = x.shape[:3]
    return x.reshape(B, N * C, *x.shape[3:])[:, :T]
