"""The short convolution in front of a recurrence."""

import jax
from flax import nnx

from pallas_kernels.causal_conv import causal_conv


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution over time, [B,T,D] -> [B,T,D], of ``width`` taps; activation "silu" or None."""

    def __init__(self, channels: int, width: int, activation: str | None, *, std: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (channels, width)), axes=("heads", "taps"))
        self.activation = activation

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        return causal_conv(x, self.weight[...], activation=self.activation, segment_ids=segment_ids)[0]
