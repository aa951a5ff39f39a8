"""How every mixer makes its projections: the model's initialisation and dtype, one place to say so."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers import Linear, ShortConvolution
from hybrid_jax.mixers.context import Context, Memory
from hybrid_jax.sharding import is_whole
from pallas_kernels import platforms

# What queries and keys may pass before the recurrence, element by element; the names are flash-linear-attention's.
FEATURE_MAPS = {
    None: lambda x: x,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "logsigmoid": jax.nn.log_sigmoid,
    "silu": jax.nn.silu,
    "sqrelu": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": partial(jax.nn.gelu, approximate=True),
}


def heads_in(model: ModelConfig, rngs: nnx.Rngs):
    """``proj(O, bias=False)``: a projection from the model's width to O = heads times head width."""
    return lambda outputs, bias=False: Linear(
        model.width, outputs, ("embed", "heads"), std=model.init_std, dtype=jnp.dtype(model.dtype), rngs=rngs, bias=bias
    )


def heads_out(inputs: int, model: ModelConfig, rngs: nnx.Rngs) -> Linear:
    """The projection from all heads back to the model's width."""
    return Linear(inputs, model.width, ("heads", "embed"), std=model.residual_std(inputs), dtype=jnp.dtype(model.dtype), rngs=rngs)


def short_convolution(width: int, activation: str | None, model: ModelConfig, rngs: nnx.Rngs):
    """``conv(channels)``: a short convolution of ``width`` taps, or None where the width is 0."""
    make = partial(ShortConvolution, width=width, activation=activation, std=model.init_std, rngs=rngs)
    return lambda channels: make(channels) if width else None


def low_rank(rank: int, outputs: int, model: ModelConfig, rngs: nnx.Rngs, bias: bool = False) -> tuple[Linear, Linear]:
    """Two projections, from the model's width to ``rank`` and on to O = heads times head width, where there may be a bias."""
    init = dict(std=model.init_std, dtype=jnp.dtype(model.dtype), rngs=rngs)
    return Linear(model.width, rank, ("embed", "rank"), **init), Linear(rank, outputs, ("rank", "heads"), bias=bias, **init)


def convolve(
    convs: tuple[ShortConvolution | None, ...],
    xs: tuple[jax.Array, ...],
    context: Context,
    memory: Memory,
    without: Callable[[jax.Array], jax.Array] = lambda x: x,
):
    """Each x through its convolution, going on from its tail: (outputs, the tails after them).

    Of a mixer without convolutions: each x through ``without``, and no tails.
    """
    if convs[0] is None:
        return tuple(without(x) for x in xs), ()
    tails = memory.tails or (None,) * len(convs)
    return zip(*(conv(x, context.segment_ids, tail) for conv, x, tail in zip(convs, xs, tails, strict=True)), strict=True)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B,T,H*K] -> [B,T,H,K]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B,T,H,V] -> [B,T,H*V]."""
    return x.reshape(*x.shape[:-2], -1)


def by_head(function: Callable[..., jax.Array], *arrays: jax.Array | None) -> jax.Array:
    """``function(*arrays)`` of arrays [B,T,H,K], where one is given; [B,T,H,K], of which each head depends on the same head alone.

    A TPU tiles an array's last two axes: [H,K] in the place of [T,H*K] is another order in memory, and XLA copies to it and back. So
    there heads of whole tiles are taken one after the other, as slices of [B,T,H*K], which is the order of projections and kernels.
    """
    *_, H, K = arrays[0].shape
    if platforms.platform() != "tpu" or K % 128 or not is_whole("heads"):
        return function(*arrays)
    heads = ([None] * H if a is None else jnp.split(merge_heads(a), H, axis=-1) for a in arrays)
    return split_heads(jnp.concatenate([function(*head) for head in zip(*heads, strict=True)], axis=-1), H)
