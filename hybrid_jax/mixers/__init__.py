"""Token mixers: one file each, parameter for parameter the layers of flash-linear-attention.

A mixer is built from its configuration (``hybrid_jax.config``), the model's, and random keys; called on x [B,T,D], and where there is
more to know a :class:`Context` and a :class:`Memory` of the tokens before x, it gives [B,T,D] and what to remember of x. The same call
trains (no memory), reads a prompt a chunk at a time, and decodes (one token, no segment ids: the operators' steps).
"""

from hybrid_jax.config import NAMES, Mixer, ModelConfig
from hybrid_jax.mixers.attention import Attention
from hybrid_jax.mixers.context import Context, Memory
from hybrid_jax.mixers.delta_net import DeltaNet
from hybrid_jax.mixers.gated_delta_net import GatedDeltaNet
from hybrid_jax.mixers.gla import GLA
from hybrid_jax.mixers.hgrn import HGRN
from hybrid_jax.mixers.hgrn2 import HGRN2
from hybrid_jax.mixers.kda import KDA
from hybrid_jax.mixers.retnet import RetNet
from hybrid_jax.mixers.rings import Rings

MIXERS = {
    "attention": Attention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "retnet": RetNet,
    "gla": GLA,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
}


def build(mixer: Mixer, model: ModelConfig, rngs):
    """The mixer module of a configuration."""
    return MIXERS[NAMES[type(mixer)]](mixer, model, rngs=rngs)


__all__ = [
    "MIXERS", "Attention", "Context", "DeltaNet", "GLA", "GatedDeltaNet", "HGRN", "HGRN2", "KDA", "Memory", "RetNet", "Rings", "build",
]  # fmt: skip
