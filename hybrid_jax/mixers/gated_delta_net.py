"""Gated DeltaNet: the delta rule with a decay a head (Yang et al., 2024, arXiv 2412.06464)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import config
from hybrid_jax.layers import RMSNorm, l2_normalize
from hybrid_jax.layers.gates import initial_decay, write_strength
from hybrid_jax.mixers.context import NO_MEMORY, ONE_DOCUMENT, Context, Memory
from hybrid_jax.mixers.projections import by_head, convolve, heads_in, heads_out, merge_heads, short_convolution, split_heads
from hybrid_jax.mixers.recurrence import recur
from pallas_kernels.gated_delta_rule import gated_delta_rule


class GatedDeltaNet(nnx.Module):
    """S' = exp(g_t) S_{t-1}, S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T; g = -exp(A_log) softplus(W_a x + dt_bias)."""

    def __init__(self, mixer: config.GatedDeltaNet, model: config.ModelConfig, *, rngs: nnx.Rngs):
        self.config = mixer
        self.value_heads = mixer.value_heads or mixer.heads
        value_width = int(mixer.head_width * mixer.expand_v)
        keys, values = mixer.heads * mixer.head_width, self.value_heads * value_width
        proj = heads_in(model, rngs)
        conv = short_convolution(mixer.conv_width, "silu", model, rngs)
        self.q_proj, self.k_proj, self.v_proj = proj(keys), proj(keys), proj(values)
        self.q_conv, self.k_conv, self.v_conv = conv(keys), conv(keys), conv(values)
        self.a_proj, self.b_proj = proj(self.value_heads), proj(self.value_heads)
        if mixer.decay_init == "zero":
            A_log, dt_bias = jnp.zeros((2, self.value_heads))
        else:
            A_log, dt_bias = initial_decay(self.value_heads, self.value_heads, 0.0, rngs)
        self.A_log = nnx.Param(A_log, axes=("heads",))
        self.dt_bias = nnx.Param(dt_bias, axes=("heads",))
        self.g_proj = proj(values) if mixer.output_gate else None
        self.o_norm = RMSNorm(value_width, model.norm_eps, activation=mixer.gate_activation)
        self.o_proj = heads_out(values, model, rngs)

    def __call__(self, x: jax.Array, context: Context = ONE_DOCUMENT, memory: Memory = NO_MEMORY) -> tuple[jax.Array, Memory]:
        convs = self.q_conv, self.k_conv, self.v_conv
        (q, k, v), tails = convolve(convs, (self.q_proj(x), self.k_proj(x), self.v_proj(x)), context, memory, without=jax.nn.silu)
        rate = jax.nn.softplus(self.a_proj(x).astype(jnp.float32) + self.dt_bias[...])
        log_decay = -jnp.exp(self.A_log[...]) * rate
        beta = write_strength(self.b_proj(x), self.config.negative_eigenvalues)
        q, k = (by_head(l2_normalize, split_heads(a, self.config.heads)) for a in (q, k))
        v = split_heads(v, self.value_heads)
        o, state = recur(gated_delta_rule, q, k, v, beta, log_decay=log_decay, context=context, state=memory.state)
        gate = None if self.g_proj is None else split_heads(self.g_proj(x), self.value_heads)
        return self.o_proj(merge_heads(by_head(self.o_norm, o, gate))), Memory(state, tails)
