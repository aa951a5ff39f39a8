"""The gated MLP of every block."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.layers.linear import Linear


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x), no biases; [B,T,D] -> [B,T,D] through width F."""

    def __init__(self, width: int, hidden: int, *, std: float, std_down: float, dtype, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, ("embed", "mlp"), std=std, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(width, hidden, ("embed", "mlp"), std=std, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, width, ("mlp", "embed"), std=std_down, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return self.down_proj(hidden.astype(x.dtype))
