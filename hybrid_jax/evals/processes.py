"""Work shared among the processes of a run, and by each among its devices: each does its part, and all processes are given all results."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import track

from hybrid_jax.config import MeshConfig
from hybrid_jax.distributed import gather
from hybrid_jax.model import Model
from hybrid_jax.sharding import make_mesh

Item = TypeVar("Item")


def shared(compute: Callable[[list[Item]], list], items: Sequence[Item], size: Callable[[Item], int]) -> list:
    """``compute(items)``, of which every process computes its share; called by all of them with the same items.

    compute: gives a result for each of some items, whatever the others are, which JSON can hold.
    size: what an item costs, roughly. The largest are dealt out first, one to each process in turn.
    """
    processes = jax.process_count()
    if processes == 1:
        return compute(list(items))
    order = sorted(range(len(items)), key=lambda i: -size(items[i]))
    share = [items[i] for i in order[jax.process_index() :: processes]]
    mine = compute(share) if share else []
    results = [None] * len(items)
    for process, part in enumerate(gather(json.dumps(mine).encode())):
        for i, result in zip(order[process::processes], json.loads(part), strict=True):
            results[i] = result
    return results


def on_local_devices(model: Model) -> tuple[Mesh, Model]:
    """A mesh that deals the rows of a batch over the devices of this process, and the model with all its parameters on each."""
    devices = jax.local_devices()
    mesh = make_mesh(MeshConfig(data=len(devices), fsdp=1), devices)
    graph, params = nnx.split(model)
    return mesh, nnx.merge(graph, jax.device_put(params, NamedSharding(mesh, PartitionSpec())))


def rows_at_once(mesh: Mesh, batch: int, rows: int) -> int:
    """Rows of a batch that is dealt over ``mesh``, each device's ``batch`` at most, no more than ``rows`` need."""
    return min(batch, -(-rows // mesh.size)) * mesh.size


def watched(items: Sequence[Item], what: str) -> Iterable[Item]:
    """``items``, and a bar in the terminal of the first process that tells how far they are."""
    return track(items, what, transient=True, disable=jax.process_index() != 0 or not sys.stdout.isatty())
