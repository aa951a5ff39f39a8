"""GLA: gated linear attention, a learned decay a key channel (Yang et al., 2023, arXiv 2312.06635)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import config
from hybrid_jax.layers import RMSNorm
from hybrid_jax.mixers.context import NO_MEMORY, ONE_DOCUMENT, Context, Memory
from hybrid_jax.mixers.projections import (
    FEATURE_MAPS,
    by_head,
    convolve,
    heads_in,
    heads_out,
    low_rank,
    merge_heads,
    short_convolution,
    split_heads,
)
from hybrid_jax.mixers.recurrence import recur
from pallas_kernels.gated_linear_attention import gated_linear_attention

GATE_RANK = 16  # of the low-rank decay projection
GATE_NORMALIZER = 16.0  # log decay = log sigmoid(.) / 16, so that decays start near one


class GLA(nnx.Module):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K); log a = log sigmoid(W_2 W_1 x + b) / 16."""

    def __init__(self, mixer: config.GLA, model: config.ModelConfig, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads = mixer.heads, mixer.kv_heads or mixer.heads
        self.log_decay_min = mixer.log_decay_min
        queries, values = int(model.width * mixer.expand_k), int(model.width * mixer.expand_v)
        keys = queries // self.heads * self.kv_heads
        kv_values = values // self.heads * self.kv_heads
        proj = heads_in(model, rngs)
        conv = short_convolution(mixer.conv_width, "silu", model, rngs)
        self.q_proj, self.k_proj, self.v_proj = proj(queries), proj(keys), proj(kv_values)
        self.q_conv, self.k_conv, self.v_conv = conv(queries), conv(keys), conv(kv_values)
        self.decay_in, self.decay_out = low_rank(GATE_RANK, keys, model, rngs, bias=True)
        self.g_proj = proj(values) if mixer.output_gate else None
        self.feature_map = FEATURE_MAPS[mixer.feature_map]
        self.g_norm = RMSNorm(values // self.heads, model.norm_eps, scale=mixer.norm_scale)
        self.o_proj = heads_out(values, model, rngs)

    def __call__(self, x: jax.Array, context: Context = ONE_DOCUMENT, memory: Memory = NO_MEMORY) -> tuple[jax.Array, Memory]:
        convs = self.q_conv, self.k_conv, self.v_conv
        (q, k, v), tails = convolve(convs, (self.q_proj(x), self.k_proj(x), self.v_proj(x)), context, memory)
        q, k = self.feature_map(q), self.feature_map(k)
        log_decay = jax.nn.log_sigmoid(self.decay_out(self.decay_in(x)).astype(jnp.float32)) / GATE_NORMALIZER
        if self.log_decay_min is not None:
            log_decay = jnp.maximum(log_decay, self.log_decay_min)
        group = self.heads // self.kv_heads
        k, v, log_decay = (jnp.repeat(split_heads(a, self.kv_heads), group, axis=2) for a in (k, v, log_decay))
        q = split_heads(q, self.heads)
        o, state = recur(gated_linear_attention, q, k, v, log_decay, context=context, state=memory.state)
        gate = None if self.g_proj is None else split_heads(self.g_proj(x), self.heads)
        return self.o_proj(merge_heads(by_head(self.g_norm, o, gate))), Memory(state, tails)
