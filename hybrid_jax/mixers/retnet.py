"""RetNet: retention with a fixed decay a head (Sun et al., 2023, arXiv 2307.08621)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import config
from hybrid_jax.layers import RMSNorm
from hybrid_jax.layers.rotary import rotate
from hybrid_jax.mixers.context import NO_MEMORY, ONE_DOCUMENT, Context, Memory
from hybrid_jax.mixers.projections import FEATURE_MAPS, by_head, heads_in, heads_out, merge_heads, split_heads
from hybrid_jax.mixers.recurrence import recur
from pallas_kernels.gated_linear_attention import gated_linear_attention

ROPE_THETA = 10000.0


class RetNet(nnx.Module):
    """S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), gamma_h = 1 - 2^(-5-h); q and k rotated."""

    def __init__(self, mixer: config.RetNet, model: config.ModelConfig, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads = mixer.heads, mixer.kv_heads or mixer.heads
        keys, values = int(model.width * mixer.expand_k), int(model.width * mixer.expand_v)
        proj = heads_in(model, rngs)
        self.q_proj = proj(keys)
        self.k_proj = proj(keys // self.heads * self.kv_heads)
        self.v_proj = proj(values // self.heads * self.kv_heads)
        self.g_proj = proj(values) if mixer.output_gate else None
        self.feature_map = FEATURE_MAPS[mixer.feature_map]
        self.g_norm = RMSNorm(values // self.heads, model.norm_eps, scale=mixer.norm_scale)
        self.o_proj = heads_out(values, model, rngs)

    def __call__(self, x: jax.Array, context: Context = ONE_DOCUMENT, memory: Memory = NO_MEMORY) -> tuple[jax.Array, Memory]:
        q = split_heads(self.feature_map(self.q_proj(x)), self.heads)
        k = split_heads(self.feature_map(self.k_proj(x)), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        group = self.heads // self.kv_heads
        places = context.places(x)
        q, k = (by_head(lambda a: rotate(a, places, ROPE_THETA), a) for a in (q, k))
        k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
        log_decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.heads, dtype=jnp.float32))))
        o, state = recur(gated_linear_attention, q, k, v, log_decay, context=context, state=memory.state)
        gate = None if self.g_proj is None else split_heads(self.g_proj(x), self.heads)
        return self.o_proj(merge_heads(by_head(self.g_norm, o, gate))), Memory(state, ())
