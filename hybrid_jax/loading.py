"""A model from whatever folder holds one."""

import dataclasses
import warnings

import jax
from etils import epath
from flax import nnx

from hybrid_jax.config import MeshConfig, RunConfig
from hybrid_jax.data import DataError
from hybrid_jax.data.store import TokenStore
from hybrid_jax.data.tokenizers import ByteTokenizer, Tokenizer
from hybrid_jax.hf import convert
from hybrid_jax.model import Model, abstract
from hybrid_jax.sharding import make_mesh
from hybrid_jax.storage import run_folder
from hybrid_jax.train.checkpoints import load_params
from hybrid_jax.train.workdir import read_config


def load(folder, step: int | None = None, dtype: str | None = None) -> Model:
    """The model in ``folder``, on the first device, with its tokenizer where the folder tells of one (``model.tokenizer``, else None).

    folder: a training run's workdir, also gs://BUCKET/FOLDER (the checkpoint of ``step``, or the newest), or a Hugging Face folder
    of flash-linear-attention. dtype: what the model computes in, "bfloat16" or "float32"; None: what the run's configuration says, and
    of a Hugging Face folder what its embeddings came in. Raises ConfigError where the folder is neither, has no such checkpoint, or
    holds what is not supported, and for another dtype.
    """
    folder, device = run_folder(folder), jax.local_devices()[0]
    if convert.is_folder(folder):
        model = convert.load(folder, device, dtype)
        model.tokenizer = _if_readable(lambda: convert.own_tokenizer(folder))
        return model
    config = read_config(folder)
    return load_run(folder, dataclasses.replace(config, model=config.model.computing_in(dtype)), step)[0]


def load_run(workdir: epath.Path, config: RunConfig, step: int | None = None) -> tuple[Model, int]:
    """(the model of a training run, the step of its checkpoint): of ``step``, or the newest that can be read. As :func:`load`."""
    found, params = load_params(workdir, config, make_mesh(MeshConfig(), jax.local_devices()[:1]), step)
    model = nnx.merge(abstract(config.model)[0], params)
    model.tokenizer = _if_readable(lambda: _run_tokenizer(workdir, config))
    return model, found


def _run_tokenizer(workdir: epath.Path, config: RunConfig) -> Tokenizer | None:
    """The one that came with the parameters, or else that of the data; None for a model that came without one and was not trained since."""
    if carried := convert.carried_tokenizer(workdir):
        return carried
    if (source := next(iter(config.data.sources))) != "stdlib":
        return TokenStore.open(source, "train").tokenizer
    return None if (workdir / "huggingface").is_dir() else ByteTokenizer()


def _if_readable(find) -> Tokenizer | None:
    """What ``find()`` gives; None, with a warning, where that cannot be read: a model is of use without its tokenizer."""
    try:
        return find()
    except DataError as error:
        warnings.warn(f"the model has no tokenizer, so that it takes tokens only: {error}", stacklevel=3)
        return None
