"""HGRN: hierarchically gated recurrence on a vector state (Qin et al., 2023, arXiv 2311.04823)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import config
from hybrid_jax.layers import RMSNorm
from hybrid_jax.layers.gates import bounded_log_sigmoid
from hybrid_jax.mixers.context import NO_MEMORY, ONE_DOCUMENT, Context, Memory
from hybrid_jax.mixers.projections import convolve, heads_in, heads_out, short_convolution
from hybrid_jax.mixers.recurrence import recur
from pallas_kernels.linear_scan import linear_scan


class HGRN(nnx.Module):
    """h_t = a_t h_{t-1} + (1 - a_t) silu(i_t), a_t = lb + (1 - lb) sigmoid(f_t); y = W_o(RMSNorm(h) silu(g))."""

    def __init__(self, mixer: config.HGRN, model: config.ModelConfig, *, rngs: nnx.Rngs):
        inner = model.width * mixer.expand_ratio
        proj = heads_in(model, rngs)
        conv = short_convolution(mixer.conv_width, None, model, rngs)
        self.i_proj, self.f_proj, self.g_proj = proj(inner), proj(inner), proj(inner)
        self.i_conv, self.f_conv = conv(inner), conv(inner)
        self.g_norm = RMSNorm(inner, model.norm_eps, scale=mixer.norm_scale)
        self.o_proj = heads_out(inner, model, rngs)

    def __call__(self, x: jax.Array, context: Context = ONE_DOCUMENT, memory: Memory = NO_MEMORY) -> tuple[jax.Array, Memory]:
        (i, f), tails = convolve((self.i_conv, self.f_conv), (self.i_proj(x), self.f_proj(x)), context, memory)
        log_decay = bounded_log_sigmoid(f, context.lower_bound)
        write = jax.nn.silu(i.astype(jnp.float32)) * -jnp.expm1(log_decay)
        h, state = recur(linear_scan, jnp.exp(log_decay), write.astype(x.dtype), context=context, state=memory.state)
        return self.o_proj(self.g_norm(h, gate=self.g_proj(x))), Memory(state, tails)
