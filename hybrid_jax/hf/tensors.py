"""safetensors of a Hugging Face folder: one file, or shards with an index. Read tensor by tensor, written shard by shard."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from hybrid_jax.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**8
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as a safetensors file says it


class Stored(NamedTuple):
    """One tensor, not read yet."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str
    rows: slice = slice(None)  # of the tensor in the file

    def read(self) -> np.ndarray:
        with _open(self.file) as file:
            return file.get_slice(self.name)[self.rows] if self.rows != slice(None) else file.get_tensor(self.name)


def find(folder: Path) -> dict[str, Stored]:
    """The tensors of ``folder`` by the names that fla gives them today.

    Raises ConfigError where there is no safetensors file, one is missing or damaged, or a tensor is of another dtype than
    float32, bfloat16 or float16. Nothing but safetensors is ever opened: a pickle can run code.
    """
    return modern({name: tensor for file in _files(folder) for name, tensor in _in_file(file).items()})


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(f"{folder / INDEX} is not an index of safetensors: copy it again") from None
    else:
        names = [SINGLE]
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{folder / INDEX} names {name!r}, which is no file of this folder")
        if not (folder / name).is_file():
            pickles = sorted(file.name for file in folder.glob("*.bin"))
            hint = f" (not {pickles[0]}, a pickle, which is never opened: save the model again as safetensors)" if pickles else ""
            raise ConfigError(f"{folder} has no {name}{hint}")
    return [folder / name for name in names]


def _open(file: Path):
    # read, not mapped: the pages of a mapped file would count as memory in use
    return safetensors.safe_open(file, framework="np", backend="pread")


def _in_file(file: Path) -> dict[str, Stored]:
    try:
        with _open(file) as opened:
            heads = {name: opened.get_slice(name) for name in opened.keys()}
            shapes = {name: (tuple(head.get_shape()), head.get_dtype()) for name, head in heads.items()}
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({error}): copy it again") from None
    for name, (_, dtype) in shapes.items():
        if dtype not in STORED:
            raise ConfigError(f"tensor {name} of {file} is {dtype}: only {', '.join(STORED)} are supported")
    return {name: Stored(file, name, shape, STORED[dtype]) for name, (shape, dtype) in shapes.items()}


def modern(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors under today's names: fla has renamed one, split one in two, and stopped using two."""
    renamed: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        up = name.replace("mlp.gate_proj", "mlp.up_proj")
        if name.endswith((".attn.D", ".attn.q_conv1d.weight")) and _is_unused(name, tensors):
            continue
        if name.endswith(".mlp.gate_proj.weight") and up not in tensors:  # before February 2025: gate over up, in one
            half = tensor.shape[0] // 2
            shape = (half, *tensor.shape[1:])
            renamed[name] = tensor._replace(shape=shape, rows=slice(0, half))
            renamed[up] = tensor._replace(shape=shape, rows=slice(half, 2 * half))
        else:
            renamed[name.replace(".attn.norm.", ".attn.o_norm.")] = tensor  # DeltaNet before December 2024
    return renamed


def _is_unused(name: str, tensors: Mapping[str, Stored]) -> bool:
    """Gated DeltaNet's D (before March 2025) and HGRN's convolution of queries it has none of (before June 2025)."""
    layer = name.split(".attn.")[0]
    return name.endswith(".D") or f"{layer}.attn.q_proj.weight" not in tensors


def check(tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise ConfigError unless ``tensors`` are those of ``shapes``; it names each that is missing, too many or misshapen."""
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is not a tensor of this model" for name in tensors if name not in shapes]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ConfigError(f"the tensors in {folder} are not those of its config.json: {'; '.join(wrong[:8])}{more}")


def write(folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], tensor: Callable[[str], np.ndarray]) -> None:
    """Write the tensors that ``shapes`` lists (shape and dtype), each made by ``tensor(name)`` when its turn comes.

    One file, or shards of about `SHARD_BYTES` with an index; one shard is in memory at a time.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    one = len(shards) == 1
    files = [SINGLE] if one else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        target = folder / file
        target.touch()
        rights = target.stat().st_mode  # those of a new file; safetensors' own is for nobody else to read
        # the metadata is what transformers looks for
        safetensors.numpy.save_file({name: tensor(name) for name in names}, target, metadata={"format": "pt"})
        target.chmod(rights)
    if not one:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
