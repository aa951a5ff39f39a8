"""Hugging Face folders as fla writes them, made of numpy alone, for the tests of conversion."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hybrid_jax.hf import names, options

BFLOAT16 = ml_dtypes.bfloat16
SMALL = dict(hidden_size=32, num_hidden_layers=4, vocab_size=61, intermediate_size=48, bos_token_id=1, eos_token_id=2)
ATTN = dict(layers=[1, 3], num_heads=2)
FAMILIES = {
    "hgrn": {},
    "hgrn2": dict(expand_ratio=16),
    "retnet": dict(num_heads=2),
    "gla": dict(num_heads=2),
    "delta_net": dict(num_heads=2),
    "gated_deltanet": dict(num_heads=2, head_dim=8),
    "kda": dict(num_heads=2, head_dim=8),
    "transformer": dict(num_heads=4, num_kv_heads=2),
}


def fla_options(model_type: str, **changes) -> dict:
    """A small config.json."""
    return {"model_type": model_type, **SMALL, **FAMILIES[model_type], **changes}


def random_tensors(described: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    """Tensors of a config.json under today's names."""
    rng = np.random.default_rng(0)
    described = options.modern(described)
    slots = names.slots(options.model_config(described, "float32"), described)
    return {name: rng.standard_normal(slot.shape).astype(dtype) for name, slot in slots.items()}


def write(folder: Path, described: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """``folder`` with a config.json and its tensors, in one file or dealt out to ``shards`` of them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(described))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder
