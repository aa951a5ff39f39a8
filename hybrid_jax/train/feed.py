"""Batches on their way to the devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_jax.config import RunConfig
from hybrid_jax.data import pipeline
from hybrid_jax.data.mqar import tasks
from hybrid_jax.data.token_source import TokenSource
from hybrid_jax.sharding import batch_sharding

DTYPES = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "segment_ids": jnp.int32}


class Feed:
    """The training batches of a run from ``start_step`` on, as global arrays [B,T] on ``mesh``. Close it.

    Raises DataError, at once, where the data do not fit the configuration.
    """

    def __init__(self, config: RunConfig, source: TokenSource, mesh: Mesh, start_step: int = 0):
        recall = config.data.mqar
        self.names, self.mesh = fields(config), mesh
        self._batches = pipeline.training_batches(
            source,
            batch=config.train.batch,
            window=config.data.window,
            seed=config.train.seed,
            packing=config.data.packing,
            mqar_tasks=tasks(recall) if recall.share else (),
            mqar_share=recall.share,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def __next__(self) -> dict[str, jax.Array]:
        batch = next(self._batches)
        return to_mesh({name: batch[name] for name in self.names}, self.mesh)

    def close(self) -> None:
        self._batches.close()


def fields(config: RunConfig) -> tuple[str, ...]:
    """The arrays of a training batch. Segment ids are left out where every row is one segment: operators then need no masks."""
    one_segment = config.data.packing == "windows" and not config.data.mqar.share
    return tuple(name for name in DTYPES if not (one_segment and name == "segment_ids"))


def batch_shapes(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What a ``Feed`` gives, as shapes."""
    shape, sharding = (config.train.batch, config.data.window), batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, DTYPES[name], sharding=sharding) for name in fields(config)}


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global [B,T] arrays on ``mesh``."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
