"""DeltaNet: linear attention that erases before it writes (Yang et al., 2024, arXiv 2406.06484)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import config
from hybrid_jax.layers import RMSNorm, l2_normalize
from hybrid_jax.mixers.context import NO_MEMORY, ONE_DOCUMENT, Context, Memory
from hybrid_jax.mixers.projections import by_head, convolve, heads_in, heads_out, merge_heads, short_convolution, split_heads
from hybrid_jax.mixers.recurrence import recur
from pallas_kernels.gated_delta_rule import gated_delta_rule

ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu, "elu": lambda x: jax.nn.elu(x) + 1, "identity": lambda x: x}


def sum_normalize(x: jax.Array) -> jax.Array:
    """x / max(sum |x|, 1e-6) over the last axis; output in x's dtype."""
    y = x.astype(jnp.float32)
    return (y / jnp.maximum(jnp.sum(jnp.abs(y), axis=-1, keepdims=True), 1e-6)).astype(x.dtype)


class DeltaNet(nnx.Module):
    """S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T, o_t = S_t^T q_t / sqrt(K), |q| = |k| = 1."""

    def __init__(self, mixer: config.DeltaNet, model: config.ModelConfig, *, rngs: nnx.Rngs):
        self.config = mixer
        keys, values = int(model.width * mixer.expand_k), int(model.width * mixer.expand_v)
        proj = heads_in(model, rngs)
        qk_conv = short_convolution(mixer.conv_width, "silu" if mixer.qk_activation == "silu" else None, model, rngs)
        v_conv = short_convolution(mixer.conv_width, "silu", model, rngs)
        self.q_proj, self.k_proj, self.v_proj = proj(keys), proj(keys), proj(values)
        self.q_conv, self.k_conv, self.v_conv = qk_conv(keys), qk_conv(keys), v_conv(values)
        self.b_proj = proj(mixer.heads) if mixer.beta else None
        self.g_proj = proj(values) if mixer.output_gate else None
        self.o_norm = RMSNorm(values // mixer.heads, model.norm_eps)
        self.o_proj = heads_out(values, model, rngs)

    def _qkv(self, x: jax.Array, context: Context, memory: Memory):
        """Queries and keys [B,T,H,K], activated and normalised, values [B,T,H,V], and the convolutions' tails."""
        convs = self.q_conv, self.k_conv, self.v_conv
        (q, k, v), tails = convolve(convs, (self.q_proj(x), self.k_proj(x), self.v_proj(x)), context, memory)
        if self.v_conv is None:
            v = jax.nn.silu(v)
        if self.q_conv is None or self.config.qk_activation != "silu":  # which the convolution does
            q, k = (ACTIVATIONS[self.config.qk_activation](a) for a in (q, k))
        q, k, v = (split_heads(a, self.config.heads) for a in (q, k, v))
        normalize = l2_normalize if self.config.qk_norm == "l2" else sum_normalize
        return by_head(normalize, q), by_head(normalize, k), v, tails

    def __call__(self, x: jax.Array, context: Context = ONE_DOCUMENT, memory: Memory = NO_MEMORY) -> tuple[jax.Array, Memory]:
        q, k, v, tails = self._qkv(x, context, memory)
        beta = jnp.ones(q.shape[:-1], jnp.float32)
        if self.b_proj is not None:
            beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        if self.config.negative_eigenvalues:
            beta = 2 * beta
        o, state = recur(gated_delta_rule, q, k, v, beta, log_decay=None, context=context, state=memory.state)
        gate = None if self.g_proj is None else split_heads(self.g_proj(x), self.config.heads)
        return self.o_proj(merge_heads(by_head(self.o_norm, o, gate))), Memory(state, tails)
