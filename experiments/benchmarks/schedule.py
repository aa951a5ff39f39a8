"""The TPU compiler's final schedule of a program, read from what libtpu writes with ``--xla_jf_dump_llo_text=true``.

A TPU core issues one VLIW bundle a cycle. For each kernel (a fusion or a Pallas call) the compiler writes the bundles in
order, and how much of each unit a bundle uses. Loops are found by their backward branches, their trips from the constants
of the exit test. The loop over a Pallas call's grid has two more trips than the grid has steps, to fill and drain its pipeline of
copies; they are left out. Of a choice between two branches the cheaper one counts, so that what is counted is at most what is run; what the
dearer ones would add is told apart. What this does not see: waits for memory, and a lone branch not taken (a predicated region counts as
run).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Bundles issued after a branch before it takes effect.
DELAY_SLOTS = 4
UNITS = ("MXU", "VALU", "XLU", "EUP", "VLOAD", "VSTORE")
FILLS, SPILLS = "VLOAD:FILL", "VSTORE:SPILL"

_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(?:>\s*)*\{")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \((!?)%(\w+)\) target = \$region(\d+)")
_EXIT = re.compile(r"%(\w+) = scmp\.(ge|eq|gt)\.s32\.totalorder (?:\(!?%\w+\), )?%(\w+), (\d+) /\* loop exit test")
_ADD = re.compile(r"%(\w+) = sadd\.s32 (?:\(!?%\w+\), )?(?:(\d+), %(\w+)|%(\w+), (\d+))")
_PHI = re.compile(r"%(\w+) = sphi %(\w+), %(\w+)")
_MOVE = re.compile(r"%(\w+) = smov (?:\(!?%\w+\), )?(\d+) ")
_SPILL = re.compile(r"sst \[smem:\[#(allocation\d+_spill)\]\] (?:\(!?%\w+\), )?%(\w+)")
_FILL = re.compile(r"%(\w+) = sld \[smem:\[#(allocation\d+_spill)\]\]")
_GRID = re.compile(r"iteration_bounds: \(([\d, ]+?),?\)")
_VMEM = re.compile(r"#allocation\d+ \[.*space=vmem, size = (0x[0-9a-f]+), scoped")


@dataclass
class Kernel:
    """One kernel's schedule, its loops weighted by their trips.

    bundles: issued in one execution; most: where every choice falls on its dearer branch.
    use: unit -> sum over bundles of the share of it in use.
    unknown_loops: those whose trips are not constants, counted once.
    """

    name: str
    bundles: int
    most: int
    vmem_bytes: int
    unknown_loops: int
    use: dict[str, float] = field(default_factory=dict)
    fills: int = 0
    spills: int = 0


def kernels(folder: Path) -> dict[str, Kernel]:
    """The kernels written under a dump folder, by name; the name is that of the instruction in the optimized HLO."""
    found = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = re.fullmatch(r"(\d+-(.*))-\d+-final_bundles\.txt", path.name)
        if match and not match[2].startswith("<"):  # what is run once, when a program is loaded and unloaded
            found[match[2]] = _kernel(match[2], path, folder, match[1])
    return found


def same_kernel(folder: Path) -> dict[str, str]:
    """Instructions that share the kernel of another: instruction -> the one it is written down for."""
    shared = {}
    for path in folder.glob("*-deduplication-map.txt"):
        key = ""
        for line in path.read_text().splitlines():
            if line.startswith("key:"):
                key = line.removeprefix("key:")
            elif line.startswith("  "):
                shared[line.strip()] = key
    return shared


def _kernel(name, path, folder, stem) -> Kernel:
    text = path.read_text(errors="replace")
    bundles = list(_bundle_texts(text))
    weights, unknown = trips(bundles)
    most = sum(weights)
    for either in choices(bundles):
        cheap, dear = sorted(either, key=lambda branch: sum(weights[i] for i in branch))
        most -= sum(weights[i] for i in cheap)
        for i in dear:
            weights[i] = 0
    kernel = Kernel(name, sum(weights), most, _vmem(folder, stem), unknown)
    for report in _matching(folder, stem, "final_hlo-static-per-bundle-utilization.txt"):
        capacity, rows = _utilization(report.read_text())
        for unit in UNITS:
            kernel.use[unit] = sum(min(row[unit] / capacity[unit], 1.0) * w for row, w in zip(rows, weights, strict=False))
        kernel.fills = sum(row[FILLS] * w for row, w in zip(rows, weights, strict=False))
        kernel.spills = sum(row[SPILLS] * w for row, w in zip(rows, weights, strict=False))
    return kernel


def _matching(folder, stem, ending) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name.startswith(stem + "-") and path.name.endswith(ending))


def _vmem(folder, stem) -> int:
    """Bytes of VMEM that the kernel's windows and scratch take."""
    for path in _matching(folder, stem, "-original.txt"):
        return sum(int(size, 16) for size in _VMEM.findall(path.read_text(errors="replace")))
    return 0


def _bundle_texts(text: str) -> Iterator[str]:
    """The text of each bundle; comments may run over lines."""
    lines: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            if lines:
                yield "\n".join(lines)
            lines = [line]
        elif lines:
            lines.append(line)
    if lines:
        yield "\n".join(lines)


def trips(bundles: list[str]) -> tuple[list[int], int]:
    """How often each bundle is issued, and the number of loops whose trips are unknown."""
    text = "\n".join(bundles)
    weights, unknown, starts, counts = [1] * len(bundles), 0, {}, _trip_counts(text)
    steps = {math.prod(map(int, bounds.split(", "))) for bounds in _GRID.findall(text)}
    loops = []
    for i, bundle in enumerate(bundles):
        for region in _REGION.findall(bundle):
            starts[region] = i
        for _, predicate, region in _BRANCH.findall(bundle):
            if region in starts:  # backward
                loops.append((starts[region], i, counts.get(predicate)))
    for start, end, count in loops:
        inner = any(s < start and end < e for s, e, _ in loops)
        if count is None:
            unknown += 1
        elif not inner and count - 2 in steps:  # the grid's
            count -= 2
        for i in range(start, min(end + DELAY_SLOTS + 1, len(bundles))):
            weights[i] *= count or 1
    return weights, unknown


def choices(bundles: list[str]) -> list[tuple[range, range]]:
    """Where one of two branches is run, the bundles of either: one is jumped over by a predicate, the other by its opposite."""
    starts = {region: i for i, bundle in enumerate(bundles) for region in _REGION.findall(bundle)}
    skipped, found = {}, []
    for i, bundle in enumerate(bundles):
        for negated, predicate, region in _BRANCH.findall(bundle):
            if starts.get(region, 0) > i:  # forward
                skipped[predicate, negated] = own = range(i + DELAY_SLOTS + 1, starts[region])
                other = skipped.get((predicate, "" if negated else "!"))
                if other is not None and other.stop <= own.start:
                    found.append((other, own))
    return found


def _trip_counts(text: str) -> dict[str, int]:
    """Predicate register of a loop's exit test -> trips, where start, step and limit are constants."""
    steps = {}
    for target, left, right, right_, left_ in _ADD.findall(text):
        steps[target] = (right or right_, int(left or left_))
    moves = {target: int(value) for target, value in _MOVE.findall(text)}
    starts = {target: moves.get(first) for target, first, _ in _PHI.findall(text)}
    spilled = dict(_SPILL.findall(text))
    filled = {register: spilled.get(place) for register, place in _FILL.findall(text)}
    counts = {}
    for predicate, comparison, counter, limit in _EXIT.findall(text):
        variable, step = steps.get(counter, (None, None))
        start = starts.get(filled.get(variable, variable))
        if start is not None and step:
            last = int(limit) + (comparison == "gt")
            counts[predicate] = max(1, math.ceil((last - start) / step))
    return counts


def _utilization(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Units of each kind, and per bundle how many of them it uses."""
    header, rows = text.split("== UTILIZATION:")
    names, capacity = header.strip().splitlines()[-2:]
    units = [name.strip() for name in names.split(",")]
    table = [dict(zip(units, map(int, line.split()), strict=True)) for line in [capacity, *rows.strip().splitlines()]]
    return table[0], table[1:]
