"""A Hugging Face folder of fla to a run's workdir and back, tensor by tensor; and a run's parameters to another run.

WORKDIR/config.json, checkpoints/0/      as of any run: the configuration, and the parameters in float32
WORKDIR/huggingface/                     what came along: config.json, tokenizer and generation files
WORKDIR/huggingface/dtypes.json          tensor -> the dtype it came in, and goes back in

float32 holds every bfloat16 and float16, so that there and back is the same bits.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from hybrid_jax.config import CheckpointConfig, ConfigError, MeshConfig, RunConfig
from hybrid_jax.data.store import TokenStore
from hybrid_jax.data.tokenizers import FILES, Tokenizer, load_tokenizer
from hybrid_jax.hf import names, options, tensors
from hybrid_jax.model import Model, abstract
from hybrid_jax.sharding import make_mesh
from hybrid_jax.storage import in_bucket
from hybrid_jax.train import workdir as workdirs
from hybrid_jax.train.checkpoints import Checkpoints, load_params, to_evaluate
from hybrid_jax.train.optimizer import evaluation_params
from hybrid_jax.train.step import TrainState, abstract_state

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip
PARTIAL = ".partial"  # in a folder that is being written
Advance = Callable[[int, int], None]  # told, as each tensor is done, its elements and those of the whole model


def is_folder(folder: Path) -> bool:
    """Whether ``folder`` holds a Hugging Face model: a config.json with a model_type."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


class Folder:
    """A Hugging Face folder, checked: its configuration is understood and its tensors are those of the model. None is read yet."""

    def __init__(self, folder: Path, dtype: str | None = None):
        """``dtype``: what the model computes in; None: bfloat16 where its embeddings are, else float32.

        Raises ConfigError, naming it, for an option, a tensor or a dtype that is missing, unknown or not supported.
        """
        if in_bucket(folder):
            raise ConfigError(f"{folder} is a Hugging Face folder in a bucket: copy it to a file system (gcloud storage cp --recursive)")
        self.path = folder
        self.options = options.modern(_read_json(folder / "config.json"))
        options.family(self.options)
        self.tensors = tensors.find(folder)
        computes = {self.tensors[name].dtype for name in ("model.embeddings.weight",) if name in self.tensors}
        self.model = options.model_config(self.options, "bfloat16" if computes == {"bfloat16"} else "float32").computing_in(dtype)
        self.slots = names.slots(self.model, self.options)
        tensors.check(self.tensors, {name: slot.shape for name, slot in self.slots.items()}, folder)

    def params(self, device: jax.Device, advance: Advance = lambda *_: None) -> nnx.State:
        """The parameters, float32, on ``device``; each is filled by its tensors one after the other."""
        filled, total = [], names.elements(self.slots)
        parameters = nnx.to_flat_state(abstract(self.model)[1])
        # the largest first: putting one on the device takes its size once more, and then the others are not there yet
        for path, leaf in sorted(parameters, key=lambda pair: -math.prod(pair[1].shape)):
            stacked = np.empty(leaf.shape, np.float32)
            for name, slot in self.slots.items():
                if slot.path == path:
                    stacked[slot.index] = slot.ours(self.tensors[name].read())
                    advance(stacked[slot.index].size, total)
            filled.append((path, leaf.replace(jax.device_put(stacked, device))))
        return nnx.from_flat_state(filled)


def from_hf(folder: Path, workdir: epath.Path, dtype: str | None = None, advance: Advance = lambda *_: None) -> RunConfig:
    """Make ``workdir`` a run that starts, at step 0, from the model in ``folder``; its configuration. ``dtype``: see :class:`Folder`.

    Raises ConfigError where the folder holds no model that is supported, or ``workdir`` has checkpoints already.
    """
    source = Folder(folder, dtype)
    run = RunConfig(model=source.model)
    _claim_empty(workdir, run)
    carried = workdir / "huggingface"
    carried.mkdir(exist_ok=True)
    for name in CARRIED:
        if (folder / name).is_file():
            (carried / name).write_bytes((folder / name).read_bytes())
    _write_json(carried / "config.json", source.options)
    _write_json(carried / "dtypes.json", {name: tensor.dtype for name, tensor in source.tensors.items()})
    _save(workdir, source.params(_cpu(), advance))
    return run


def from_run(source: epath.Path, workdir: epath.Path, step: int | None = None) -> tuple[RunConfig, int]:
    """Make ``workdir`` a run that starts, at step 0, from the parameters to evaluate of the run in ``source``, and what came along there.

    step: of the checkpoint read; None: the newest. Returns the configuration, which is that of ``source``, and the step read.
    Raises ConfigError where ``source`` holds no such checkpoint, or ``workdir`` has checkpoints already.
    """
    run = workdirs.read_config(source)
    _claim_empty(workdir, run)
    step, params = load_params(source, run, make_mesh(MeshConfig(), [_cpu()]), step)
    if (source / "huggingface").is_dir():
        (workdir / "huggingface").mkdir(exist_ok=True)
        for file in (source / "huggingface").iterdir():
            (workdir / "huggingface" / file.name).write_bytes(file.read_bytes())
    _save(workdir, params)
    return run, step


def _claim_empty(workdir: epath.Path, run: RunConfig) -> None:
    if workdirs.saved_steps(workdir):
        raise ConfigError(f"{workdir} has checkpoints already: give another --workdir")
    workdirs.claim(workdir, run)


def _save(workdir: epath.Path, params: nnx.State) -> None:
    with _sparing_memory(params), Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        checkpoints.save_params(params)


def to_hf(workdir: epath.Path, folder: Path, step: int | None = None, dtype: str | None = None, advance: Advance = lambda *_: None) -> int:
    """Write the checkpoint of ``step`` (None: the newest) in ``workdir`` as the Hugging Face ``folder``; the step written.

    ``dtype`` is of all tensors ("float32", "bfloat16" or "float16"); None: each that it came in, float32 for a model of our own.
    Raises ConfigError where there is no such checkpoint, fla has no such model, ``folder`` has files already, or a value
    does not fit the dtype. Whatever stops it, ``folder`` is then as it was, and the same can be asked for again.
    """
    run = workdirs.read_config(workdir)
    if folder.exists() and any(path.name != PARTIAL for path in folder.iterdir()):
        raise ConfigError(f"{folder} has files already: give an empty or a new folder")
    carried = workdir / "huggingface"
    came = carried.is_dir()
    described = (
        options.with_positions(_read_json(carried / "config.json"), run.model) if came else options.fla_options(run.model) | _tokens(run)
    )
    slots = names.slots(run.model, described)
    before = _read_json(carried / "dtypes.json") if came else {}
    dtypes = {name: tensors.DTYPES[dtype or before.get(name, "float32")] for name in slots}
    total = names.elements(slots)
    state = abstract_state(run, make_mesh(MeshConfig(), [_cpu()])).state

    def tensor(name: str) -> np.ndarray:
        slot = slots[name]
        value = np.ascontiguousarray(slot.theirs(parameter(slot.path)[slot.index]), dtypes[name])
        if dtypes[name].itemsize < 4 and not np.isfinite(value.astype(np.float32)).all():
            raise ConfigError(f"{name} has values that are no {dtypes[name].name}: choose another --to_dtype")
        advance(value.size, total)
        return value

    with Checkpoints(workdir, reading=_sparing_memory(state.params)) as checkpoints:
        step, parameter = _parameters(checkpoints, run, state, step)
        with _filled_at_once(folder) as partial:
            tensors.write(partial, {name: (slot.shape, dtypes[name]) for name, slot in slots.items()}, tensor)
            for name in CARRIED:
                if came and (carried / name).exists():
                    (partial / name).write_bytes((carried / name).read_bytes())
            source = next(iter(run.data.sources))
            if not came and source != "stdlib":  # whose tokens are bytes, of which transformers has no tokenizer
                TokenStore.open(source, "train").tokenizer.save(partial)
            key = "dtype" if "dtype" in described else "torch_dtype"
            _write_json(partial / "config.json", described | {key: dtypes["model.embeddings.weight"].name})
    return step


@contextlib.contextmanager
def _filled_at_once(folder: Path) -> Iterator[Path]:
    """A folder to write in: at the end its files become those of ``folder``; on an error it goes, and ``folder`` too if it was not there.

    It is in ``folder``, not beside it, which may be a mount, a link, or all that may be written to.
    """
    new, partial = not folder.exists(), folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # last: now it is whole
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial)
        if new and not any(folder.iterdir()):
            folder.rmdir()


def _parameters(checkpoints: Checkpoints, run: RunConfig, state: TrainState, step: int | None) -> tuple[int, Callable[[tuple], np.ndarray]]:
    """(the step read, a function that gives its parameter at a path); one parameter is in memory at a time."""

    def read(wanted: tuple, step: int | None) -> tuple[int, np.ndarray]:
        def alone(tree: nnx.State) -> nnx.State:
            leaves = nnx.to_flat_state(tree)
            return nnx.from_flat_state([(path, leaf if path == wanted else leaf.replace(ocp.PLACEHOLDER)) for path, leaf in leaves])

        def its(tree: nnx.State) -> jax.Array:
            return dict(nnx.to_flat_state(tree))[wanted][...]

        step, loaded = checkpoints.load(step, to_evaluate(run.optimizer, state, alone))
        opt_state = loaded.get("opt_state")
        if opt_state:
            opt_state = (opt_state[-1]._replace(z=its(opt_state[-1].z)),)
        return step, np.asarray(evaluation_params(run.optimizer, its(loaded["params"]), opt_state))

    step, _ = read(("norm", "scale"), step)  # the newest that can be read
    return step, lru_cache(maxsize=1)(lambda path: read(path, step)[1])


def carried_tokenizer(workdir: epath.Path) -> Tokenizer | None:
    """The tokenizer that came with the model in ``workdir``; None where none did. Raises DataError where it cannot be read."""
    return own_tokenizer(workdir / "huggingface")


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a Hugging Face folder; None where there is none. Raises DataError where it cannot be read."""
    return load_tokenizer(folder) if any((folder / name).exists() for name in FILES) else None


def load(folder: Path, device: jax.Device, dtype: str | None = None) -> Model:
    """The model in a Hugging Face folder, on ``device``; ``dtype`` and ConfigError as of :class:`Folder`."""
    source = Folder(folder, dtype)
    return nnx.merge(abstract(source.model)[0], source.params(device))


def _tokens(run: RunConfig) -> dict[str, Any]:
    source = next(iter(run.data.sources))
    end = 256 if source == "stdlib" else TokenStore.open(source, "train").tokenizer.document_end
    return {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}


def _sparing_memory(params: nnx.State) -> ocp.Context:
    """Orbax with one parameter at a time on its way from or to the disk, so that there is never a second copy of them all."""
    largest = max(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(params))
    context = ocp.Context()
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = largest + 1  # Orbax wants less than the limit
    context.array.saving.storage_options.chunk_byte_size = 2**26  # each is encoded in memory
    return context


def _cpu() -> jax.Device:
    """Conversion needs no accelerator, and a host has more memory."""
    return jax.local_devices(backend="cpu")[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} holds no Hugging Face model: it has no {file.name}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}): copy it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not a JSON object: copy it again")
    return values


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
