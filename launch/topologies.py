"""What a step can be compiled for ahead of time, by name: slices of TPUs, and hosts with GPUs."""

import dataclasses
import math
import re
from typing import NamedTuple

from experiments.compiled.targets import GPUS
from hybrid_jax.config import ConfigError, RunConfig
from launch.accelerators import GENERATIONS, Generation

CARDS = tuple(name.removeprefix("gpu:") for name in GPUS)
MOST_CARDS = 8  # that NVLink connects in one host


class Slices(NamedTuple):
    """Slices of one topology of TPUs, connected by the data-center network."""

    generation: Generation
    topology: str  # "16x16"
    slices: int

    @property
    def kind(self) -> str:
        """Of chip: "v5e"."""
        return self.generation.spoken

    @property
    def name(self) -> str:
        """As libtpu has it."""
        return f"{self.kind}:{self.topology}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of a slice's torus."""
        return tuple(map(int, self.topology.split("x")))

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.sizes)


class Hosts(NamedTuple):
    """Hosts with GPUs of one kind, all connected with all in a host, and a network between hosts."""

    kind: str  # "h100"
    hosts: int
    cards: int  # of each

    slices = 1  # a GPU's host is no part of the mesh

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.hosts}x{self.cards}" if self.hosts > 1 else f"{self.kind}:{self.cards}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.cards,)

    @property
    def chips(self) -> int:
        return self.hosts * self.cards


Target = Slices | Hosts


def find(name: str, slices: int = 1) -> Target:
    """The topology ``name``: "v5p:4x4x8", so many slices of it, or "h100:4x8", hosts x GPUs. Raises ConfigError where there is none."""
    kind, _, topology = name.partition(":")
    if kind in CARDS:
        return _find_hosts(kind, topology, slices)
    generation = next((each for each in GENERATIONS if each.spoken == kind), None)
    if generation is None:
        known = ", ".join(each.spoken for each in GENERATIONS)
        hint = f"give v5e:16x16 or h100:4x8 (hosts x GPUs), for example; there are {known}; {', '.join(CARDS)}"
        raise ConfigError(f"--topology={name}: {hint}")
    if topology not in generation.topologies.values():
        some = ", ".join(list(generation.topologies.values())[:24])
        raise ConfigError(f"--topology={name}: {kind} has no {topology or 'such'} slices; it has {some}")
    return Slices(generation, topology, slices)


def _find_hosts(kind: str, topology: str, slices: int) -> Hosts:
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", topology)
    if not match or int(match[2]) > MOST_CARDS:
        most = f"--topology={kind}:{MOST_CARDS} is one host with {MOST_CARDS}, the most there are"
        raise ConfigError(f"--topology={kind}:{topology}: give GPUs, or hosts x GPUs of each: {most}, {kind}:4x{MOST_CARDS} four of them")
    if slices > 1:
        raise ConfigError(f"--slices={slices}: GPUs have hosts instead; give --topology={kind}:{slices}x{match[2]}")
    return Hosts(kind, int(match[1] or 1), int(match[2]))


def with_mesh(config: RunConfig, text: str) -> RunConfig:
    """The run with the sizes of ``text``, such as "data=4,fsdp=64". Raises ConfigError where they are none."""
    axes = [field.name for field in dataclasses.fields(config.mesh)]
    sizes = dict(re.findall(r"(\w+)=(-?\d+)(?:,|$)", text))
    if not sizes or not set(sizes) <= set(axes) or text != ",".join(f"{axis}={size}" for axis, size in sizes.items()):
        raise ConfigError(f"--mesh={text}: give sizes of {', '.join(axes)}, such as --mesh=data=4,fsdp=64")
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **{axis: int(size) for axis, size in sizes.items()}))
