"""The parts mixers and blocks are made of."""

from hybrid_jax.layers.conv import ShortConvolution
from hybrid_jax.layers.linear import Embedding, Linear
from hybrid_jax.layers.mlp import SwiGLU
from hybrid_jax.layers.norm import RMSNorm, l2_normalize

__all__ = ["Embedding", "Linear", "RMSNorm", "ShortConvolution", "SwiGLU", "l2_normalize"]
