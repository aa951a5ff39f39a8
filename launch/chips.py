"""How chips of each kind are connected, and how long a step's traffic takes them at the least."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.compiled.collectives import Collective, sent
from launch.topologies import CARDS


class Links(NamedTuple):
    devices: int  # that JAX makes of a chip
    link_rate: float  # bytes a second, as all below: of one link to a neighbour, or to the switch that connects all, one way
    ring: int | None  # a dimension of the torus of so many chips, or a multiple, is a ring; any other is a line. None: there is a switch
    dcn_rate: float  # of the network between slices or hosts, one way


# Of the pages that `hybrid_jax.chips` names. Interconnect there is of all links of a chip, four where the torus is flat and six
# elsewhere, both ways; the network of a v5e or v6e is that of a pod of 256 chips. What those pages leave out, v4's links and network, and
# which dimensions are rings, is of https://jax-ml.github.io/scaling-book/tpus. Of H100 and H200 NVIDIA's data sheets, 900 GB/s of NVLink
# both ways among them; the network is a DGX's, 400 Gb/s for each GPU.
LINKS = {
    "v4": Links(1, 45e9, 4, 50e9 / 8),
    "v5e": Links(1, 400e9 / 8, 16, 6.4e12 / 256 / 8),
    "v5p": Links(1, 1200e9 / 12, 4, 50e9 / 8),
    "v6e": Links(1, 800e9 / 8, 16, 25.6e12 / 256 / 8),
    "tpu7x": Links(2, 1200e9 / 12, 4, 100e9 / 8),
} | dict.fromkeys(CARDS, Links(1, 900e9 / 2, None, 400e9 / 8))


class Place(NamedTuple):
    """Where the devices of a mesh are, in its order."""

    coordinates: np.ndarray  # [n,3] of the chip in its slice; [n,1] of a GPU in its host
    slice: np.ndarray  # [n], or the host

    @classmethod
    def of(cls, devices: Iterable) -> "Place":
        devices = list(devices)
        if devices[0].platform == "gpu":
            hosts = np.array([device.process_index for device in devices])
            ids = np.array([device.id for device in devices])
            return cls((ids % (len(ids) // len(set(hosts))))[:, None], hosts)
        return cls(np.array([device.coords for device in devices]), np.array([getattr(device, "slice_index", 0) for device in devices]))


def network_seconds(links: Links, topology: tuple[int, ...], place: Place, one: Collective) -> tuple[float, float]:
    """How long the links within slices and the network between them take for a collective at the least, all at once and both ways.

    A group's bytes go over the links of the dimensions it extends in: two a chip for a ring, one for a line, whose ends have no more,
    and one to a switch. Between slices, or hosts with GPUs, each chip sends its part of what its slice has to tell. Cores of one chip
    cost nothing.
    """
    groups = np.array(one.groups)
    coordinates, slices = place.coordinates[groups], place.slice[groups]  # [G,n,3], [G,n]
    extends = [i for i, size in enumerate(topology) if size > 1 and (coordinates[..., i] != coordinates[:, :1, i]).any()]
    across = max(len(set(row)) for row in slices.tolist())
    chips = max(len(set(map(tuple, row))) for row in coordinates.tolist())
    members = groups.shape[1]
    within = dcn = 0.0
    if extends:
        streams = links.devices * chips * (1 if one.kind == "collective-permute" else across) / members  # groups that share a chip's links
        used = sum(2 if links.ring and topology[i] % links.ring == 0 else 1 for i in extends)
        within = one.count * streams * sent(one.kind, chips, one.bytes) / (used * links.link_rate)
    if across > 1:
        dcn = one.count * links.devices * across / members * sent(one.kind, across, one.bytes) / links.dcn_rate
    return within, dcn


def network(links: Links, topology: tuple[int, ...], place: Place, found: Iterable[Collective], shape: dict[str, int]) -> dict[str, float]:
    """Seconds by what is crossed, such as "fsdp" or "data, between slices" (of GPUs: between hosts), each of a whole step."""
    seconds: dict[str, float] = {}
    parts = "slices" if links.ring else "hosts"
    for one in found:
        axes = "+".join(one.axes(shape))
        for name, time in zip((axes, f"{axes}, between {parts}"), network_seconds(links, topology, place, one), strict=True):
            if time:
                seconds[name] = seconds.get(name, 0.0) + time
    return seconds
