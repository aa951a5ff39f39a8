"""The convolution token by token: the definition, and the decoding step."""
import jax
import jax.numpy as jnp

from pallas_kernels.segments import Segments, one_segment


def causal_conv_step(x, weight, state, activation):
    """y = act(sum_w weight[:, w] * [state, x]_w); the state drops its oldest input and takes x."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    taps = jnp.concatenate([state.astype(dtype), x.astype(dtype)[:, None]], axis=1)  # [B,W,D]
    y = jnp.sum(taps * weight.astype(dtype).T, axis=1)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype), taps[:, 1:]


def causal_conv(x, weight, activation, initial_state, segments: Segments | None):
    """[B,T,D] by a scan over T; see api.py."""
    B, T, D = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((B, weight.shape[1] - 1, D), dtype) if initial_state is None else initial_state.astype(dtype)
    segments = one_segment(B, T) if segments is None else segments

    def step(carry, token):
        state, document = carry
        x, index, real = token
        state = jnp.where((index == document)[:, None, None], state, 0)
        y, after = causal_conv_step(jnp.where(real[:, None], x, 0), weight, state, activation)
        state = jnp.where(real[:, None, None], after, state)
        return (state, index), jnp.where(real[:, None], y, 0)

    tokens = (x.swapaxes(0, 1), segments.index.T, segments.real.T)
    (state, _), y = jax.lax.scan(step, (state, segments.index[:, 0]), tokens)
    return y.swapaxes(0, 1), state
