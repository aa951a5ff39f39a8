"""The TPUs that can be asked for by name: their sizes, hosts, software and zones, and what is said of a wrong one.

A size is checked here before anything is created; whether a zone offers it today, only Google Cloud knows, and is asked
(``launch.gcloud.list_types``). Sources: for sizes and topologies https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x;
for software https://docs.cloud.google.com/tpu/docs/runtimes; for zones https://docs.cloud.google.com/tpu/docs/regions-zones.
"""

import difflib
import re
from typing import NamedTuple

from hybrid_jax.config import ConfigError


class Generation(NamedTuple):
    prefix: str  # of accelerator types
    spoken: str  # what people call it
    units_per_chip: int  # what the number in the name counts: chips, or TensorCores of which there are two a chip
    topologies: dict[int, str]  # by chips
    single_host: int  # the most chips that one host has
    runtime: str | None  # None: not by the Cloud TPU API, only on GKE
    zones: tuple[str, ...]  # that the page above lists; a hint, not a rule


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 768: "8x8x12"}
_CUBES |= {1024: "8x8x16", 2048: "8x16x16"}
_LARGE = {4096: "16x16x16", 6144: "16x16x24"}

GENERATIONS = (
    Generation("v4", "v4", 2, _CUBES, 4, "tpu-ubuntu2204-base", ("us-central2-b",)),
    Generation(
        *("v5litepod", "v5e", 1, _FLAT, 8, "v2-alpha-tpuv5-lite"),
        ("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b"),
    ),
    Generation("v5p", "v5p", 2, _CUBES | _LARGE, 4, "v2-alpha-tpuv5", ("us-central1-a", "us-east5-a", "europe-west4-b")),
    Generation(
        *("v6e", "v6e", 1, _FLAT, 8, "v2-alpha-tpuv6e"),
        ("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "us-south1-ai1b", "europe-west4-a"),
    ),
    Generation("tpu7x", "tpu7x", 2, _CUBES | _LARGE, 4, None, ("us-central1-c",)),
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
        count, hosts = f"{slices} x " if slices > 1 else "", slices * self.hosts
        return f"{count}{self.name}: {count}{self.chips} chips ({self.topology}) on {hosts} host{'s' if hosts > 1 else ''}"


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
                raise ConfigError(f"{name} can not be had as a TPU VM, only on GKE: use python -m launch.gke")
            return Accelerator(name, generation, chips)
    raise ConfigError(f"there is no accelerator type {name!r}; {_meant(name, names(on_gke=on_gke))}")


def _meant(name: str, known: list[str]) -> str:
    for generation in GENERATIONS:  # its name right, in one of the ways it is said, and its size wrong: all its sizes
        family, size = re.match(r"(?:tpu-?)?([^-]*)-?(.*)", name.lower()).groups()
        if family in (generation.prefix, generation.spoken) or f"tpu{family}" == generation.prefix:
            sizes = [each for each in known if each.startswith(f"{generation.prefix}-")]
            if (meant := f"{generation.prefix}-{size}") in sizes:
                return f"did you mean {meant}?"
            if sizes:
                counts = "chips" if generation.units_per_chip == 1 else "TensorCores, two a chip"
                return f"the sizes of {generation.prefix} are (in {counts}): {', '.join(each.rpartition('-')[2] for each in sizes)}"
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"


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
