"""Models with random parameters, drawn by NumPy: nothing is compiled for them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import Model
from hybrid_jax.config import ModelConfig
from hybrid_jax.model import abstract

CENTRES = {"scale": 1.0, "A_log": 1.5, "dt_bias": -4.0}  # what parameters of these names lie around; all others around 0


def random_model(model: ModelConfig, seed: int = 0, std: float = 0.28) -> Model:
    """A model whose every parameter is random: initial ones and zeros would hide mistakes. ``std``: of each, around its centre."""
    graph, params = abstract(model)
    rng = np.random.default_rng(seed)
    drawn = [
        (path, leaf.replace(jnp.asarray(CENTRES.get(path[-1], 0.0) + std * rng.standard_normal(leaf.shape), leaf.dtype)))
        for path, leaf in nnx.to_flat_state(params)
    ]
    return nnx.merge(graph, nnx.from_flat_state(drawn))
