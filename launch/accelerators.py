"""The TPUs that can be asked for by name: their sizes, hosts, software and zones, and what is said of a wrong one.

A size is checked here before anything is created; whether a zone offers it today, only Google Cloud knows, and is asked
(``launch.gcloud.Tpu.list_types``). Sources, below https://docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e and tpu7x for sizes and
topologies, runtimes for software, regions-zones for zones.
"""

import difflib
import math
import re
from typing import NamedTuple

from hybrid_jax.amounts import count
from hybrid_jax.config import ConfigError
from hybrid_jax.config.errors import meant


class Generation(NamedTuple):
    prefix: str  # of accelerator types
    spoken: str  # what people call it
    units_per_chip: int  # what the number in the name counts: chips, or TensorCores of which there are two a chip
    topologies: dict[int, str]  # by chips
    single_host: int  # the most chips that one host has
    runtime: str | None  # None: not by the Cloud TPU API, only on GKE
    zones: tuple[str, ...]  # that the page above lists; a hint, not a rule


def _by_chips(topologies: str) -> dict[int, str]:
    return {math.prod(map(int, topology.split("x"))): topology for topology in topologies.split()}


_FLAT = _by_chips("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16")
_CUBES = _by_chips("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16")
# One for each count of chips: the default ones of https://github.com/AI-Hypercomputer/xpk, src/xpk/core/system_characteristics.py.
_TORI = _by_chips("""
    2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x4x20 4x8x12 4x4x28 8x8x8 4x12x12 4x8x20 4x4x44 8x8x12 4x4x52 4x8x28 4x12x20
    8x8x16 4x4x68 8x12x12 4x4x76 8x8x20 4x12x28 4x8x44 4x4x92 8x12x16 4x20x20 4x8x52 12x12x12 8x8x28 4x4x116 8x12x20 4x4x124 8x16x16
    4x12x44 4x8x68 4x20x28 12x12x16 4x4x148 4x8x76 4x12x52 8x16x20 4x4x164 8x12x28 4x4x172 8x8x44 12x12x20 4x8x92 4x4x188 12x16x16
    4x28x28 8x20x20 4x12x68 8x8x52 4x4x212 12x12x24 4x20x44 8x16x28 4x12x76 4x8x116 4x4x236 12x16x20 4x4x244 4x8x124 12x12x28 16x16x16
    4x20x52 8x12x44 8x8x68 4x12x92 8x20x28 12x16x24 4x8x148 12x20x20 8x8x76 4x28x44 8x12x52 16x16x20 12x12x36 4x8x164 12x16x28 4x20x68
    4x8x172 4x12x116 8x16x44 12x20x24 4x28x52 8x8x92 4x12x124 4x8x188 4x20x76 16x16x24 12x24x24 16x16x32 16x20x28 16x24x24
""")
_V5P = {chips: topology for chips, topology in _TORI.items() if chips <= 6144}  # the largest that can be had

GENERATIONS = (
    Generation("v4", "v4", 2, _CUBES, 4, "tpu-ubuntu2204-base", ("us-central2-b",)),
    Generation(
        *("v5litepod", "v5e", 1, _FLAT, 8, "v2-alpha-tpuv5-lite"),
        ("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b"),
    ),
    Generation("v5p", "v5p", 2, _V5P, 4, "v2-alpha-tpuv5", ("us-central1-a", "us-east5-a", "europe-west4-b")),
    Generation(
        *("v6e", "v6e", 1, _FLAT, 8, "v2-alpha-tpuv6e"),
        ("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "us-south1-ai1b", "europe-west4-a"),
    ),
    Generation("tpu7x", "tpu7x", 2, _TORI, 4, None, ("us-central1-c",)),
)


class Accelerator(NamedTuple):
    name: str  # as Google Cloud has it: "v5litepod-256"
    generation: Generation
    chips: int

    @property
    def topology(self) -> str:
        return self.generation.topologies[self.chips]

    @property
    def hosts(self) -> int:
        """Virtual machines: a slice that does not fit on one has four chips on each."""
        return 1 if self.chips <= self.generation.single_host else self.chips // 4

    def describe(self, slices: int) -> str:
        times = f"{slices} x " if slices > 1 else ""
        return f"{times}{self.name}: {times}{count(self.chips, 'chip')} ({self.topology}) on {count(slices * self.hosts, 'host')}"


def names(*, on_gke: bool) -> list[str]:
    """Every accelerator type that can be asked for."""
    return [
        f"{generation.prefix}-{chips * generation.units_per_chip}"
        for generation in GENERATIONS
        if on_gke or generation.runtime
        for chips in generation.topologies
    ]


def find(name: str, *, on_gke: bool = False) -> Accelerator:
    """The accelerator type ``name``. Raises ConfigError with the closest ones where there is none."""
    for generation in GENERATIONS:
        match = re.fullmatch(rf"{generation.prefix}-(\d+)", name)
        chips, rest = divmod(int(match[1]), generation.units_per_chip) if match else (0, 0)
        if rest == 0 and chips in generation.topologies:
            if not (on_gke or generation.runtime):
                raise ConfigError(f"{name} cannot be had as a TPU VM, only on GKE: use python -m launch.gke")
            return Accelerator(name, generation, chips)
    raise ConfigError(f"there is no accelerator type {name!r}; {_meant(name, names(on_gke=on_gke))}")


def _meant(name: str, known: list[str]) -> str:
    for generation in GENERATIONS:  # its name right, in one of the ways it is said, and its size wrong: all its sizes
        family, size = re.match(r"(?:tpu-?)?([^-]*)-?(.*)", name.lower()).groups()
        if family in (generation.prefix, generation.spoken) or f"tpu{family}" == generation.prefix:
            sizes = [int(each.rpartition("-")[2]) for each in known if each.startswith(f"{generation.prefix}-")]
            if size.isdigit() and int(size) in sizes:
                return f"did you mean {generation.prefix}-{size}?"
            if sizes:
                counts = "chips" if generation.units_per_chip == 1 else "TensorCores, two a chip"
                near = sorted(sizes, key=lambda each: abs(each - int(size)))[:10] if size.isdigit() else sizes[:10]
                return f"sizes of {generation.prefix} are (in {counts}): {', '.join(map(str, sorted(near)))}"
    return meant(name, known)


def check_zone(zone: str) -> None:
    """Raises ConfigError where ``zone`` does not look like one (a region does not)."""
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+", zone):
        known = sorted({each for generation in GENERATIONS for each in generation.zones})
        close = [each for each in known if zone and each.startswith(zone)] or difflib.get_close_matches(zone, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "it looks like us-west4-a"
        raise ConfigError(f"{zone!r} is not a zone; {hint}")


def zone_note(accelerator: Accelerator, zone: str) -> str | None:
    """What the documentation says against looking for ``accelerator`` in ``zone``; None where it is listed."""
    zones = accelerator.generation.zones
    return None if zone in zones else f"{accelerator.generation.spoken} is listed for {', '.join(zones)}, not for {zone}"
