"""Work shared among the processes of a run: each does its part, and all of them are given all results."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import numpy as np
from rich.progress import track

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


def gather(content: bytes) -> list[bytes]:
    """The ``content`` of every process, in their order."""
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.array(len(content), np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return [row[:size].tobytes() for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)]


def watched(items: Sequence[Item], what: str) -> Iterable[Item]:
    """``items``, and a bar in the terminal of the first process that tells how far they are."""
    return track(items, what, transient=True, disable=jax.process_index() != 0 or not sys.stdout.isatty())
