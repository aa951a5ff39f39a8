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
        self.names, self._rows = fields(config), LocalRows(mesh, config.train.batch)
        self._batches = pipeline.training_batches(
            source,
            batch=config.train.batch,
            window=config.data.window,
            seed=config.train.seed,
            packing=config.data.packing,
            mqar_tasks=tasks(recall) if recall.share else (),
            mqar_share=recall.share,
            start_step=start_step,
            local=self._rows.numbers,
        )

    def __next__(self) -> dict[str, jax.Array]:
        batch = next(self._batches)
        return self._rows.to_mesh({name: batch[name] for name in self.names})

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


class LocalRows:
    """The rows of a batch that the devices of this process hold, in whole or in part.

    Processes hold the same ones where their devices are apart along ``tensor``, or along ``seq``, where each holds a stretch of them.

    numbers: those rows, ascending.
    """

    def __init__(self, mesh: Mesh, batch: int):
        self._batch, self._sharding = batch, batch_sharding(mesh)
        held = self._sharding.addressable_devices_indices_map((batch, mesh.shape["seq"])).values()
        self.numbers = sorted({row for rows, _ in held for row in range(batch)[rows]})

    def to_mesh(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global [batch,T] arrays on the mesh, of this process's rows of them, each [len(numbers),T]."""

        def place(rows: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, slice]) -> np.ndarray:
                first, last, _ = index[0].indices(self._batch)
                at = self.numbers.index(first)
                return rows[at : at + last - first, index[1]]

            return jax.make_array_from_callback((self._batch, rows.shape[1]), self._sharding, part)

        return {name: place(rows) for name, rows in arrays.items()}
