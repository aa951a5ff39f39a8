"""Runs small enough to compile in seconds, for the tests of training."""

import jax
import numpy as np

from hybrid_jax import config
from hybrid_jax.config import RunConfig
from hybrid_jax.sharding import batch_sharding


def small_run(**changes) -> RunConfig:
    """A one-layer attention model of width 16 on windows of 12 tokens; ``changes`` are fields by group, as {"train": {...}}."""
    values = {
        "model": {
            "mixer": {"name": "attention", "heads": 2},
            "layers": 1,
            "width": 16,
            "mlp_width": 16,
            "vocabulary": 32,
            "dtype": "float32",
            "remat": "none",
        },
        "data": {"window": 12},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "train": {"steps": 20, "batch": 8, "microbatch": 8},
    }
    for group, fields in changes.items():
        values[group] = {**values.get(group, {}), **fields}
    return config.from_dict(RunConfig, values)


def random_batch(seed: int, run: RunConfig, mesh=None) -> dict[str, jax.Array]:
    """Documents and weights of every kind: rows wholly masked, weights that differ, padding."""
    rng = np.random.default_rng(seed)
    shape = (run.train.batch, run.data.window)
    weights = rng.random(shape) * (rng.random(shape) > 0.3)
    weights[rng.integers(shape[0])] = 0
    batch = {
        "tokens": rng.integers(0, run.model.vocabulary, shape).astype(np.int32),
        "targets": rng.integers(0, run.model.vocabulary, shape).astype(np.int32),
        "weights": weights.astype(np.float32),
        "segment_ids": np.sort(rng.integers(0, 3, shape), axis=1).astype(np.int32),
    }
    return batch if mesh is None else {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
