"""Dense projections and the embedding: float32 parameters, products in the compute dtype."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.sharding import constrain


class Linear(nnx.Module):
    """y = x W (+ b), x [..., I] -> [..., O]; W ~ N(0, std), b = 0."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str, str], *, std: float, dtype, rngs: nnx.Rngs, bias: bool = False):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs)), axes=axes)
        self.bias = nnx.Param(jnp.zeros(outputs), axes=axes[1:]) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """Token ids [B,T] -> rows of a [vocabulary, D] table, unscaled."""

    def __init__(self, vocabulary: int, width: int, *, std: float, dtype, rngs: nnx.Rngs):
        self.table = nnx.Param(std * jax.random.normal(rngs.params(), (vocabulary, width)), axes=("vocabulary", "embed"))
        self.dtype = dtype

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return _rows(self.dtype, self.table[...], tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(dtype, table, tokens):
    # Whole rows on every device before the look-up: what is gathered then lies as the tokens do, over the batch. In the compute dtype
    # as it lies first, so that it is sent in that.
    return constrain(constrain(table.astype(dtype), "vocabulary", "embed"), "vocabulary", None)[tokens]


def _rows_forward(dtype, table, tokens):
    return _rows(dtype, table, tokens), (table, tokens)


def _rows_backward(dtype, residuals, d_rows):
    """Summed in float32: the thousands of gradients of a frequent token, added up one by one in bfloat16, would stop at some size."""
    table, tokens = residuals
    zeros = constrain(jnp.zeros(table.shape, jnp.float32), "vocabulary", None)
    return zeros.at[tokens].add(d_rows.astype(jnp.float32)).astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
