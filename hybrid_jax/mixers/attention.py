"""Full softmax attention, with rotary positions or none."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import config
from hybrid_jax.layers import RMSNorm
from hybrid_jax.layers.rotary import rotate
from hybrid_jax.mixers.context import NO_MEMORY, ONE_DOCUMENT, Context, Memory
from hybrid_jax.mixers.projections import heads_in, heads_out, merge_heads, split_heads
from hybrid_jax.sharding import on_each_device
from pallas_kernels.attention import attention, attention_prefill, attention_step

QK_NORM_EPS = 1e-5  # fixed in flash-linear-attention, whatever the model's eps


class Attention(nnx.Module):
    """o = softmax(q k^T / sqrt(K) + causal mask) v, key and value heads shared by groups of query heads."""

    def __init__(self, mixer: config.Attention, model: config.ModelConfig, *, rngs: nnx.Rngs):
        self.config = mixer
        head_width = model.width // mixer.heads
        self.kv_heads = mixer.kv_heads or mixer.heads
        proj = heads_in(model, rngs)
        self.q_proj = proj(model.width, bias=mixer.qkv_bias)
        self.k_proj = proj(self.kv_heads * head_width, bias=mixer.qkv_bias)
        self.v_proj = proj(self.kv_heads * head_width, bias=mixer.qkv_bias)
        self.q_norm = RMSNorm(head_width, QK_NORM_EPS) if mixer.qk_norm else None
        self.k_norm = RMSNorm(head_width, QK_NORM_EPS) if mixer.qk_norm else None
        self.o_proj = heads_out(model.width, model, rngs)

    def __call__(self, x: jax.Array, context: Context = ONE_DOCUMENT, memory: Memory = NO_MEMORY) -> tuple[jax.Array, Memory]:
        q = split_heads(self.q_proj(x), self.config.heads)
        k = split_heads(self.k_proj(x), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope_theta is not None:
            places = context.places(x)
            q, k = (rotate(a, places, self.config.rope_theta) for a in (q, k))
        if memory.state is None:
            o = on_each_device(attention, q, k, v, window=self.config.window, segment_ids=context.segment_ids)
        else:
            memory = Memory(memory.state.write(k, v, context.lengths, context.real), ())
            o = self._attend(q, *memory.state.read(), context)
        return self.o_proj(merge_heads(o)), memory

    def _attend(self, q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, context: Context) -> jax.Array:
        lengths = context.lengths + jnp.sum(context.real, axis=1)
        if q.shape[1] == 1:
            return attention_step(q[:, 0], k_cache, v_cache, lengths, window=self.config.window)[:, None]
        return attention_prefill(q, k_cache, v_cache, lengths, window=self.config.window, segment_ids=context.segment_ids)
