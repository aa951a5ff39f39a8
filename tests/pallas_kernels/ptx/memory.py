"""The shared memory of a CTA, and who of those that read and wrote it knows of whom.

Agents are warps, and for each warp its products (wgmma) and its stores (TMA) in flight; barriers stand for the loads that they count.
Each has a clock. A warp has *seen* another agent up to some tick of its clock: barriers tell. Loads, stores and products go through
another proxy to memory; what a warp has *fenced* is what is known to that one. An access that meets a newer one is a race.
"""

from collections import Counter

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANE, WARP

BYTES = 232448  # of a CTA's shared memory
START = 1024  # address of the first, which swizzled tiles are aligned to
BARRIERS = 64


class Agents:
    """Numbers of the agents of so many warpgroups: warps come first."""

    def __init__(self, warpgroups: int):
        self.warps = 4 * warpgroups
        self.readers = 3 * self.warps
        self.all = self.readers + BARRIERS

    def products(self, warp):
        return self.warps + warp

    def stores(self, warp):
        return 2 * self.warps + warp

    def loads(self, barrier):
        return self.readers + barrier


class Clocks:
    """seen, fenced: [warps, agents], up to which tick."""

    def __init__(self, agents: Agents):
        self.seen = np.zeros((agents.warps, agents.all), np.int32)
        self.fenced = np.zeros_like(self.seen)
        self.tick(np.arange(agents.warps))

    def tick(self, warps):
        self.seen[warps, warps] += 1

    def told(self, warps):
        """What these warps know, for a barrier to tell; what they do after is newer."""
        known = np.stack([self.seen[warps].max(0), self.fenced[warps].max(0)])
        self.tick(warps)
        return known

    def learn(self, warps, known):
        self.seen[warps] = np.maximum(self.seen[warps], known[0])
        self.fenced[warps] = np.maximum(self.fenced[warps], known[1])

    def completed(self, warps, agent, count):
        for clocks in (self.seen, self.fenced):
            clocks[warps, agent] = np.maximum(clocks[warps, agent], count)

    def fence(self, warps):
        self.fenced[warps] = self.seen[warps]
        self.tick(warps)


class Memory:
    """bytes: NaN, in every format, until they are written. faults: how often each was found."""

    def __init__(self, agents: Agents, clocks: Clocks, faults: Counter):
        self.bytes = np.full(START + BYTES, 0xFF, np.uint8)
        words = self.bytes.size // 4
        self.writer, self.written = np.zeros(words, np.int16), np.zeros(words, np.int32)
        self.read_at = np.zeros((words, agents.readers), np.int32)
        self.agents, self.clocks, self.faults = agents, clocks, faults

    def _check(self, known, words, what, line, writes):
        """known: what the accessing warp knows, [agents] or [lanes, 1, agents]."""
        writers = self.writer[words]
        of_writer = known[writers] if known.ndim == 1 else np.take_along_axis(known[:, 0], writers, axis=1)
        if np.any(of_writer < self.written[words]):
            self.faults[f"{what} of what is not known to be written: {line}"] += 1
        if writes and np.any(self.read_at[words] > known[..., : self.agents.readers]):
            self.faults[f"{what} over what is not known to be read: {line}"] += 1

    def load(self, warps, addresses, line):
        """By warps [lanes], at addresses [lanes,k]."""
        words = addresses // 4
        self._check(self.clocks.seen[warps][:, None], words, "load", line, False)
        self.read_at[words, warps[:, None]] = self.clocks.seen[warps, warps][:, None]

    def store(self, warps, addresses, line):
        words = addresses // 4
        self._check(self.clocks.seen[warps][:, None], words, "store", line, True)
        self.writer[words] = warps[:, None]
        self.written[words] = self.clocks.seen[warps, warps][:, None]

    def async_read(self, warps, words, agents, tick, line):
        """Of words, that all of the warps ask for, by agents that are done at a tick of theirs."""
        for warp in warps:
            self._check(self.clocks.fenced[warp], words, "asynchronous read", line, False)
        self.read_at[words[:, None], agents] = tick

    def async_write(self, warp, words, agent, tick, line):
        self._check(self.clocks.fenced[warp], words, "asynchronous write", line, True)
        self.writer[words], self.written[words] = agent, tick


def warps_of(warpgroup: int) -> np.ndarray:
    """[128]: of each lane."""
    return 4 * warpgroup + LANE // WARP
