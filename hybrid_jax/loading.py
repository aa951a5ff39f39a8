"""A model from whatever folder holds one."""

from pathlib import Path

import jax
from flax import nnx

from hybrid_jax.config import MeshConfig
from hybrid_jax.hf import convert
from hybrid_jax.model import Model, abstract
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.checkpoints import load_params
from hybrid_jax.train.workdir import read_config


def load(folder, step: int | None = None) -> Model:
    """The model in ``folder``, on the first device.

    folder: a training run's workdir (the checkpoint of ``step``, or the newest), or a Hugging Face folder of
    flash-linear-attention. Raises ConfigError where it is neither, has no such checkpoint, or holds what is not supported.
    """
    folder, device = Path(folder), jax.local_devices()[0]
    if convert.is_folder(folder):
        return convert.load(folder, device)
    config = read_config(folder)
    _, params = load_params(folder, config, make_mesh(MeshConfig(), [device]), step)
    return nnx.merge(abstract(config.model)[0], params)
