"""How arrays lie for the TPU kernels of the recurrences with matrix states, and what XLA is told of the kernels' cost."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_linear_attention.tpu_decays import LANES


def columns(x: jax.Array, tokens: int) -> jax.Array:
    """[B,T,HV,width] -> [B,N C,HV W]: chunks of C = ``tokens``, W whole registers."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % tokens), (0, 0), (0, -x.shape[3] % LANES)])
    return x.reshape(*x.shape[:2], -1)


def rows(x: jax.Array, tokens: int, heads: int) -> jax.Array:
    """[B,T,HV] -> [B,HV/G,G,N C]: chunks of C = ``tokens``, groups of G = ``heads``."""
    B, T, HV = x.shape
    x = jnp.pad(x, [(0, 0), (0, -T % tokens), (0, 0)])
    return jnp.moveaxis(x, 1, 2).reshape(B, HV // heads, heads, -1)


def padded_state(state: jax.Array) -> jax.Array:
    """[B,HV,K,V] -> the same in float32, K and V whole registers."""
    return jnp.pad(state.astype(jnp.float32), [(0, 0), (0, 0), (0, -state.shape[2] % LANES), (0, -state.shape[3] % LANES)])


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """[B,T] with as many axes as ``other``."""
    return x.reshape(*x.shape, *[1] * (other.ndim - 2))


def cost(tokens: int, heads: int, moved, products: tuple[int, int]) -> pl.CostEstimate:
    """Of a kernel over chunks of ``tokens`` that moves ``moved``, q first and v third.

    products: how many are over pairs of tokens, and how many meet the state; XLA's own estimates take it from here.
    """
    (B, T, width), v, (pairs, meetings) = moved[0].shape, moved[2], products
    return pl.CostEstimate(
        flops=2 * B * T * v.shape[2] * (pairs * tokens + meetings * width // heads),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        transcendentals=B * T * heads * tokens,
    )
