"""What the devices of a mesh tell each other: the collectives of an optimized HLO module, and the axes of the mesh they cross."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.compiled.hlo import Module, array_bytes

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Groups of partitions, which are the places of a mesh in order: listed; as a reshaped and transposed count; as axes of a mesh of XLA's own.
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_COUNT = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_COUNTED = re.compile(rf"replica_groups=\[([\d,]+)\]<={_COUNT}")
_BY_AXES = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_COUNT}|([\d,]+))\))? *\{{([^}}]*)\}}")
_PART = re.compile(r"(?:\((\d+)\)(\d+))?$")  # of an axis: "(how many parts before it) its size"


# Between slices each device exchanges its part with those in its place, through its host: "{1,2}x{0:3}" is slices 1 and 2, devices 0 to 3.
_BETWEEN = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x.*_xla_megascale_transfer_type="(\w+)"')


class Collective(NamedTuple):
    """A collective that every device takes part in ``count`` times.

    bytes: of the whole array, as each device has it after an all-gather, or before any other kind.
    groups: of places in the mesh; of a collective-permute the pairs, from and to.
    """

    kind: str
    count: int
    bytes: int
    groups: tuple[tuple[int, ...], ...]

    def axes(self, shape: dict[str, int]) -> tuple[str, ...]:
        """The axes of a mesh of this shape, along which the devices of a group differ."""
        places = [np.unravel_index(group, tuple(shape.values())) for group in self.groups]
        return tuple(axis for i, axis in enumerate(shape) if any(np.ptp(place[i]) for place in places))


def sent(kind: str, parts: int, bytes: float) -> float:
    """Bytes that each of ``parts`` has to send, and to receive, at the least: those of a ring."""
    if kind == "collective-permute":
        return bytes if parts > 1 else 0.0
    return (2 if kind == "all-reduce" else 1) * bytes * (parts - 1) / parts


def collectives(module: Module, devices: int) -> list[Collective]:
    """Those of a module compiled for so many devices, in no particular order; of asynchronous ones the start counts, of a conditional the
    branch with the fewest bytes.
    """

    def bytes_sent(execution) -> float:
        return sum(one.count * sent(one.kind, len(one.groups[0]), one.bytes) for one in _of(module, execution, devices))

    return [found for execution in module.cheapest(bytes_sent) for found in _of(module, execution, devices)]


def _of(module, execution, devices) -> Iterator[Collective]:
    for computation, instruction in module.parts(execution.computation, execution.name):
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and (match := _BETWEEN.search(instruction.attributes)):
            kind, found = _between(*match.groups(), devices)
        elif kind in KINDS:
            found = tuple(group for group in groups(instruction.attributes, devices) if len(set(group)) > 1)
        else:
            continue
        if not found:
            continue  # each device by itself
        bytes = sum(array_bytes(module.computations[computation][name].type) for name in instruction.operands)
        if kind == "all-gather":
            bytes *= len(found[0])
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # XLA's fusion of an all-reduce of which each device keeps its part
        yield Collective(kind, execution.count, bytes, found)


def _between(slices: str, transfer: str, devices: int) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """Kind and groups of a transfer between slices, which are the outer part of the mesh."""
    ends = [[int(end) for end in part.split(":")] for part in slices.split(",")]
    count = sum(end[-1] - end[0] + 1 for end in ends)
    kind = transfer.lower().replace("_", "-")
    within = devices // count
    groups = tuple(tuple(range(place, devices, within)) for place in range(within))
    return kind if kind in KINDS else "collective-permute", groups


def groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """The groups, or the pairs, that an instruction's attributes give. Raises ValueError where they cannot be read."""
    if match := _COUNTED.search(attributes):
        shape, *count = match.groups()
        return [tuple(group) for group in _counted(*count).reshape(_integers(shape)).tolist()]
    if match := _BY_AXES.search(attributes):
        sizes, shape, transpose, listed, axes = match.groups()
        ids = _counted(shape, transpose) if shape else np.array(_integers(listed or ""), int)
        return _along(dict(item.replace("'", "").split("=") for item in sizes.split(",")), ids, axes)
    if match := _LISTED.search(attributes):
        listed = [tuple(_integers(group)) for group in re.findall(r"\{([\d,]*)\}", match[1])]
        return listed or [tuple(range(devices))]
    raise ValueError(f"a collective's groups cannot be read: {attributes[:200]}")


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _counted(shape: str, transpose: str | None) -> np.ndarray:
    """0, 1, 2, ... in this shape, with its axes in another order."""
    counted = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return counted.transpose(_integers(transpose)) if transpose else counted


def _along(axes: dict[str, str], ids: np.ndarray, chosen: str) -> list[tuple[int, ...]]:
    """The groups that differ in the ``chosen`` axes, such as ``a,b:(2)4``: all of a, and of b the part of 4 below its first part of 2.

    ids: of the places of the mesh of ``axes`` in order; none: 0, 1, 2, ...
    """
    names, sizes = list(axes), [int(size) for size in axes.values()]
    ids = ids.ravel() if ids.size else np.arange(math.prod(sizes))
    places = np.array(np.unravel_index(np.arange(ids.size), sizes))
    for text in chosen.replace("'", "").split(","):
        name, _, part = text.partition(":")
        axis = names.index(name)
        before, size = map(int, _PART.match(part).groups(default=0)) if part else (1, sizes[axis])
        below = sizes[axis] // (before * size)
        places[axis] -= places[axis] // below % size * below
    first = np.ravel_multi_index(places, sizes)  # of each one's group
    return [tuple(ids[first == one].tolist()) for one in np.unique(first)]


def total(found: Sequence[Collective], shape: dict[str, int]) -> list[dict]:
    """By kind and axes: how often, and the bytes that a device sends; most first."""
    sums: dict[tuple, dict] = {}
    for one in found:
        row = sums.setdefault((one.kind, one.axes(shape)), {"count": 0, "bytes": 0.0})
        row["count"] += one.count
        row["bytes"] += one.count * sent(one.kind, len(one.groups[0]), one.bytes)
    rows = [{"kind": kind, "axes": axes} | row for (kind, axes), row in sums.items()]
    return sorted(rows, key=lambda row: -row["bytes"])
