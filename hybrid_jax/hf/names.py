"""Where each of fla's tensors lies in our parameters.

Ours are stacked over the layers of a run and multiply from the right; fla's are one a layer, and multiply from the left.
The list follows from the model itself: walk its parameters, and every one is a tensor of fla's for each of its layers.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from hybrid_jax import layout
from hybrid_jax.config import GLA, KDA, ModelConfig, RetNet
from hybrid_jax.model import abstract

TOP = {
    ("embedding", "table"): "model.embeddings.weight",
    ("norm", "scale"): "model.norm.weight",
    ("output", "kernel"): "lm_head.weight",
    ("lower_bounds",): "model.lower_bounds",
}
MODULES = {"decay_in": "gk_proj.0", "decay_out": "gk_proj.1", "q_conv": "q_conv1d", "k_conv": "k_conv1d", "v_conv": "v_conv1d"}
MODULES |= {"i_conv": "i_conv1d", "f_conv": "f_conv1d"}
OF_KDA = {"decay_in": "f_proj.0", "decay_out": "f_proj.1", "gate_in": "g_proj.0", "gate_out": "g_proj.1"}


class Slot(NamedTuple):
    """The place of one of fla's tensors: ``index`` into the leading axes of the parameter at ``path``."""

    path: tuple
    index: tuple[int, ...]
    shape: tuple[int, ...]  # of fla's tensor

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """fla's tensor as it lies in the parameter (a view)."""
        if self.path[-1] == "kernel":
            return tensor.T  # [O,I] -> [I,O]
        return tensor[:, 0] if self.path[-1] == "weight" else tensor  # of a convolution: [D,1,W] -> [D,W]

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`ours` (a view)."""
        if self.path[-1] == "kernel":
            return array.T
        return array[:, None] if self.path[-1] == "weight" else array


def slots(model: ModelConfig, options: Mapping[str, Any]) -> dict[str, Slot]:
    """fla's name of every tensor of ``model`` -> where it lies, parameter by parameter.

    ``options`` are those of fla's config.json: with fuse_norm (the default) a norm that is also gated has another name.
    """
    fused = options.get("fuse_norm", True) and isinstance(model.mixer, (GLA, RetNet)) and model.mixer.output_gate
    modules = MODULES | ({"g_norm": "g_norm_swish_gate"} if fused else {}) | (OF_KDA if isinstance(model.mixer, KDA) else {})
    stages = layout.stages(model.layer_kinds)
    found = {}
    for path, parameter in nnx.to_flat_state(abstract(model)[1]):
        if path in TOP:
            found[TOP[path]] = Slot(path, (), _shape(path, parameter.shape))
            continue
        _, stage, _, run, *inside = path
        name = _in_layer(inside, modules)
        for repeat, layers in enumerate(stages[stage].layers(run)):
            for place, layer in enumerate(layers):
                found[f"model.layers.{layer}.{name}"] = Slot(path, (repeat, place), _shape(path, parameter.shape[2:]))
    return found


def _in_layer(path: list, modules: Mapping[str, str]) -> str:
    """Such as "attn.q_proj.weight" for mixer, q_proj, kernel."""
    names = ["attn" if name == "mixer" else modules.get(name, name) for name in path]
    return ".".join([*names[:-1], {"kernel": "weight", "scale": "weight"}.get(names[-1], names[-1])])


def _shape(path: tuple, ours: tuple[int, ...]) -> tuple[int, ...]:
    shapes = {"kernel": ours[::-1], "weight": (*ours[:1], 1, *ours[1:])}
    return shapes.get(path[-1], ours)


def elements(found: Mapping[str, Slot]) -> int:
    """The numbers in all those tensors."""
    return sum(math.prod(slot.shape) for slot in found.values())
