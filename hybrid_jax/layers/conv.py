"""The short convolution in front of a recurrence."""

import jax
from flax import nnx

from hybrid_jax.sharding import on_each_device
from pallas_kernels.causal_conv import causal_conv, causal_conv_step


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution over time, [B,T,D] -> [B,T,D], of ``width`` taps; activation "silu" or None."""

    def __init__(self, channels: int, width: int, activation: str | None, *, std: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (channels, width)), axes=("heads", "taps"))
        self.activation = activation

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None, tail: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Also the tail [B,width-1,D] in x's dtype, the inputs that the next tokens' taps reach; ``tail``: that of the tokens before x."""
        if tail is not None and segment_ids is None and x.shape[1] == 1:
            y, tail = causal_conv_step(x[:, 0], self.weight[...], tail, activation=self.activation)
            y = y[:, None]
        else:
            given = dict(activation=self.activation, initial_state=tail, segment_ids=segment_ids)
            y, tail = on_each_device(causal_conv, x, self.weight[...], **given)
        return y, tail.astype(x.dtype)  # inputs, as they came
