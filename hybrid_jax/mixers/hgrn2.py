"""HGRN2: HGRN with an outer-product state (Qin et al., 2024, arXiv 2404.07904)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import config
from hybrid_jax.layers import RMSNorm
from hybrid_jax.layers.gates import bounded_log_sigmoid
from hybrid_jax.mixers.context import NO_MEMORY, ONE_DOCUMENT, Context, Memory
from hybrid_jax.mixers.projections import convolve, heads_in, heads_out, merge_heads, short_convolution, split_heads
from hybrid_jax.mixers.recurrence import recur
from pallas_kernels.gated_linear_attention import gated_linear_attention

NORM_EPS = 1e-5  # fixed in flash-linear-attention, whatever the model's eps


class HGRN2(nnx.Module):
    """S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T, o_t = S_t^T silu(q_t) / sqrt(K); one norm over all heads, no output gate."""

    def __init__(self, mixer: config.HGRN2, model: config.ModelConfig, *, rngs: nnx.Rngs):
        self.heads = model.width // mixer.expand_ratio
        keys = self.heads * mixer.expand_ratio
        proj = heads_in(model, rngs)
        conv = short_convolution(mixer.conv_width, None, model, rngs)
        self.q_proj, self.f_proj, self.i_proj = proj(keys), proj(keys), proj(model.width)
        self.q_conv, self.f_conv, self.i_conv = conv(keys), conv(keys), conv(model.width)
        self.g_norm = RMSNorm(model.width, NORM_EPS, scale=mixer.norm_scale)
        self.o_proj = heads_out(model.width, model, rngs)

    def __call__(self, x: jax.Array, context: Context = ONE_DOCUMENT, memory: Memory = NO_MEMORY) -> tuple[jax.Array, Memory]:
        convs = self.q_conv, self.f_conv, self.i_conv
        (q, f, v), tails = convolve(convs, (self.q_proj(x), self.f_proj(x), self.i_proj(x)), context, memory)
        log_decay = bounded_log_sigmoid(f, context.lower_bound)
        k = -jnp.expm1(log_decay).astype(x.dtype)
        q, k, v, log_decay = (split_heads(a, self.heads) for a in (jax.nn.silu(q), k, v, log_decay))
        o, state = recur(gated_linear_attention, q, k, v, log_decay, context=context, state=memory.state)
        return self.o_proj(self.g_norm(merge_heads(o))), Memory(state, tails)
