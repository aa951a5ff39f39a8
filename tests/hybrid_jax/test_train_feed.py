"""Rows on their way to a mesh; that several processes make the rows which theirs hold is shown by tests/experiments/test_processes.py."""

import jax
import numpy as np
import pytest

from hybrid_jax.config import MeshConfig
from hybrid_jax.data.mqar import Task
from hybrid_jax.data.pipeline import training_batches
from hybrid_jax.sharding import batch_sharding, make_mesh
from hybrid_jax.train.feed import Feed, LocalRows
from tests.hybrid_jax.data_samples import array_source
from tests.hybrid_jax.train_runs import small_run


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 1, "seq": 4}, {"fsdp": 2, "seq": 2, "tensor": 2}, {"fsdp": 1, "tensor": 8}]
)
def test_every_device_gets_its_rows_and_its_stretch_of_them(sizes):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[::-1])
    rows, batch = LocalRows(mesh, 16), np.arange(16 * 8, dtype=np.int32).reshape(16, 8)
    assert rows.numbers == list(range(16))
    placed = rows.to_mesh({"tokens": batch})["tokens"]
    assert placed.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(placed, batch)


def test_of_a_batch_only_the_rows_that_are_held_are_read(monkeypatch):
    """As by a process whose devices hold the first and the last of four parts: arrays of these rows alone."""
    mesh, shardings = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4]), jax.sharding.NamedSharding
    held = dict(list(batch_sharding(mesh).devices_indices_map((8, 1)).items())[::3])
    monkeypatch.setattr(shardings, "addressable_devices_indices_map", lambda *_: held)
    rows, seen = LocalRows(mesh, 8), {}
    assert rows.numbers == [0, 1, 6, 7]

    def from_callback(shape, sharding, part):
        seen.update({index[0].start or 0: (part(index), index) for index in held.values()})

    monkeypatch.setattr(jax, "make_array_from_callback", from_callback)
    whole = np.arange(8 * 3).reshape(8, 3)
    rows.to_mesh({"tokens": whole[rows.numbers]})
    assert seen.keys() == {0, 6}
    for found, index in seen.values():
        np.testing.assert_array_equal(found, whole[index])

    # and no others are made: neither of training
    source, options = array_source([30, 40] * 4), {"batch": 8, "window": 12}
    monkeypatch.setattr(LocalRows, "to_mesh", lambda rows, arrays: seen.update(arrays))
    feed = Feed(small_run(model={"vocabulary": 257}, train={"seed": 3, "batch": 8, "microbatch": 2}), source, mesh)
    batches = training_batches(source, seed=3, **options)
    next(feed)
    np.testing.assert_array_equal(seen["targets"], next(batches)["targets"][[0, 1, 6, 7]])
    feed.close()
    batches.close()


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_its_batches_are_those_that_the_configuration_says(packing, share):
    """Every field of it that chooses rows, from the step on that a run goes on from."""
    recall = {"share": share, "pairs": [1, 2], "length": [4, 8], "alphabet": 5}
    run = small_run(model={"vocabulary": 257}, data={"packing": packing, "mqar": recall}, train={"seed": 7, "batch": 4})
    source = array_source([5, 30, 9, 40] * 5)
    tasks = [Task(1, 4, 5), Task(2, 8, 5)] if share else []
    options = {"batch": 4, "window": 12, "seed": 7, "packing": packing, "mqar_tasks": tasks, "mqar_share": share}
    feed = Feed(run, source, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), start_step=3)
    batches = training_batches(source, **options, start_step=3)
    names = {"tokens", "targets", "weights"} | ({"segment_ids"} if share or packing == "documents" else set())
    for _ in range(3):
        found, expected = next(feed), next(batches)
        assert found.keys() == names  # without segment ids a row would be one document, and problems see one another
        for name in names:
            np.testing.assert_array_equal(found[name], expected[name])
    feed.close()
    batches.close()
