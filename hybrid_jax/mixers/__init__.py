"""Token mixers: one file each, parameter for parameter the layers of flash-linear-attention.

A mixer is built from its configuration (``hybrid_jax.config``), the model's, and random keys; called on x [B,T,D], and where there is
more to know a :class:`Context` and a :class:`Memory` of the tokens before x, it gives [B,T,D] and what to remember of x. The same call
trains (no memory), reads a prompt a chunk at a time, and decodes (one token, no segment ids: the operators' steps).
"""

from hybrid_jax import config
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

MIXERS = {  # the module of each configuration's class; one of your own: docs/extending.md
    config.Attention: Attention,
    config.HGRN: HGRN,
    config.HGRN2: HGRN2,
    config.RetNet: RetNet,
    config.GLA: GLA,
    config.DeltaNet: DeltaNet,
    config.GatedDeltaNet: GatedDeltaNet,
    config.KDA: KDA,
}


def build(mixer: config.Mixer, model: config.ModelConfig, rngs):
    """The mixer module of a configuration. Raises ConfigError where :data:`MIXERS` has none."""
    if type(mixer) not in MIXERS:
        raise config.ConfigError(f"there is no module of mixer {mixer.name!r}: hybrid_jax.mixers.MIXERS[{type(mixer).__name__}] = ...")
    return MIXERS[type(mixer)](mixer, model, rngs=rngs)


__all__ = [
    "MIXERS", "Attention", "Context", "DeltaNet", "GLA", "GatedDeltaNet", "HGRN", "HGRN2", "KDA", "Memory", "RetNet", "Rings", "build",
]  # fmt: skip
