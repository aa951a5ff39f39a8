"""KDA: Kimi Delta Attention, the delta rule with a decay a key channel (Kimi Team, 2025, arXiv 2510.26692)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import config
from hybrid_jax.layers import RMSNorm, l2_normalize
from hybrid_jax.layers.gates import initial_decay, write_strength
from hybrid_jax.mixers.context import NO_MEMORY, ONE_DOCUMENT, Context, Memory
from hybrid_jax.mixers.projections import by_head, convolve, heads_in, heads_out, low_rank, merge_heads, short_convolution, split_heads
from hybrid_jax.mixers.recurrence import recur
from pallas_kernels.gated_delta_rule import gated_delta_rule


class KDA(nnx.Module):
    """S' = diag(exp g_t) S_{t-1}, S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T, o_t = S_t^T q_t / sqrt(K), |q| = |k| = 1.

    g = -exp(A_log) softplus(f), or m sigmoid(exp(A_log) f) with m = log_decay_min; f = W_2 W_1 x + dt_bias.
    """

    def __init__(self, mixer: config.KDA, model: config.ModelConfig, *, rngs: nnx.Rngs):
        self.config = mixer
        self.value_heads = mixer.value_heads or mixer.heads
        value_width = int(mixer.head_width * mixer.expand_v)  # the rank of decays and output gates too, as in flash-linear-attention
        keys, values, decays = mixer.heads * mixer.head_width, self.value_heads * value_width, self.value_heads * mixer.head_width
        proj = heads_in(model, rngs)
        conv = short_convolution(mixer.conv_width, "silu", model, rngs)
        self.q_proj, self.k_proj, self.v_proj = proj(keys), proj(keys), proj(values)
        self.q_conv, self.k_conv, self.v_conv = conv(keys), conv(keys), conv(values)
        self.b_proj = proj(self.value_heads)
        self.decay_in, self.decay_out = low_rank(value_width, decays, model, rngs)
        A_log, dt_bias = initial_decay(self.value_heads, decays, 1.0, rngs)
        if mixer.log_decay_min is not None:  # in the sigmoid an A of 16 times a dt_bias of -2 would leave no decay, and no gradient
            A_log = jnp.zeros_like(A_log)
        self.A_log = nnx.Param(A_log, axes=("heads",))
        self.dt_bias = nnx.Param(dt_bias, axes=("heads",))
        self.gate_in, self.gate_out = low_rank(value_width, values, model, rngs, bias=True)
        self.o_norm = RMSNorm(value_width, model.norm_eps, activation="sigmoid")
        self.o_proj = heads_out(values, model, rngs)

    def __call__(self, x: jax.Array, context: Context = ONE_DOCUMENT, memory: Memory = NO_MEMORY) -> tuple[jax.Array, Memory]:
        convs = self.q_conv, self.k_conv, self.v_conv
        (q, k, v), tails = convolve(convs, (self.q_proj(x), self.k_proj(x), self.v_proj(x)), context, memory, without=jax.nn.silu)
        log_decay = split_heads(self._log_decay(x), self.value_heads)
        beta = write_strength(self.b_proj(x), self.config.negative_eigenvalues)
        q, k = (by_head(l2_normalize, split_heads(a, self.config.heads)) for a in (q, k))
        v = split_heads(v, self.value_heads)
        o, state = recur(gated_delta_rule, q, k, v, beta, log_decay=log_decay, context=context, state=memory.state)
        gate = split_heads(self.gate_out(self.gate_in(x)), self.value_heads)
        return self.o_proj(merge_heads(by_head(self.o_norm, o, gate))), Memory(state, tails)

    def _log_decay(self, x: jax.Array) -> jax.Array:
        """[B,T,HV*K] float32, none above 0."""
        A = jnp.repeat(jnp.exp(self.A_log[...]), self.config.head_width)
        f = self.decay_out(self.decay_in(x)).astype(jnp.float32) + self.dt_bias[...]
        least = self.config.log_decay_min
        return -A * jax.nn.softplus(f) if least is None else least * jax.nn.sigmoid(A * f)
