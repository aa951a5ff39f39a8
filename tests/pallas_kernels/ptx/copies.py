"""Barriers in shared memory, and the copies that the engine makes between it and arrays: loads that barriers count, stores in groups."""

from functools import cache

import numpy as np

from tests.pallas_kernels.ptx.launch import Descriptor, address

SWIZZLE_TILE = 1024  # bytes that a pattern of 128-byte rows repeats after


def swizzled(addresses):
    """With a swizzle of 128 bytes: the 16 bytes' place in a row is changed by the row's number."""
    return addresses ^ (((addresses >> 7) & 7) << 4)


class Barrier:
    """count: arrivals of a phase. arrivals, bytes: still to come. phases: completed. known: what was told until the last of them."""

    def __init__(self, number: int, count: int, agents: int):
        self.number, self.count, self.arrivals, self.bytes, self.phases = number, count, count, 0, 0
        self.known, self.telling = np.zeros((2, 2, agents), np.int32)

    def change(self, arrivals: int, of_bytes: int, known=0):
        self.arrivals -= arrivals
        self.bytes += of_bytes
        self.telling = np.maximum(self.telling, known)
        assert self.arrivals >= 0, "more arrivals than a barrier waits for"
        if self.arrivals == 0 and self.bytes == 0:
            self.arrivals, self.known = self.count, self.telling.copy()
            self.phases += 1


@cache
def _positions(box):
    return np.indices(box).reshape(len(box), -1)


def places(descriptor: Descriptor, coordinates, item: int, at: int):
    """(offsets of a box's elements from the base in global memory, which of them the array has, addresses in shared memory from ``at``).

    coordinates: innermost first. item: bytes of an element.
    """
    offsets, inside = 0, True
    for position, first, size, stride in zip(
        _positions(descriptor.box), coordinates[::-1], descriptor.shape, descriptor.strides, strict=True
    ):
        index = position + first
        inside &= (index >= 0) & (index < size)
        offsets = offsets + index * stride
    assert descriptor.swizzle in (16, 128), descriptor
    assert at % (SWIZZLE_TILE if descriptor.swizzle == 128 else 128) == 0, "a tile that is not aligned"
    shared = at + np.arange(offsets.size) * item
    return offsets * item, inside, swizzled(shared) if descriptor.swizzle == 128 else shared


def _bytes(addresses, item):
    return (addresses[:, None] + np.arange(item)).ravel()


class Copies:
    """Of a CTA. arrays: in global memory, each as (its bytes, the bytes of an element). on_their_way: loads."""

    def __init__(self, memory, arrays, random):
        self.memory, self.arrays, self.random = memory, arrays, random
        self.on_their_way = []

    def array(self, pointer: int):
        """(bytes of the array, bytes of its element, the offset there)."""
        k = (pointer >> 36) - 1
        return *self.arrays[k], pointer - address(k)

    def load(self, warp, descriptor, coordinates, at, barrier, line):
        """Until it arrives, at a time of its own, memory holds nothing that is of use."""
        source, item, base = self.array(descriptor.base)
        offsets, inside, shared = places(descriptor, coordinates, item, at)
        data = np.where(np.repeat(inside, item), source[_bytes(np.where(inside, base + offsets, 0), item)], 0).astype(np.uint8)
        agent = self.memory.agents.loads(barrier.number)
        self.memory.async_write(warp, np.unique(shared // 4), agent, barrier.phases + 1, line)
        shared = _bytes(shared, item)
        self.memory.bytes[shared] = 0xFF
        self.on_their_way.append((shared, data, barrier))

    def arrive(self):
        """One of the loads does."""
        shared, data, barrier = self.on_their_way.pop(self.random.integers(len(self.on_their_way)))
        self.memory.bytes[shared] = data
        barrier.change(0, -data.size)


class Stores:
    """Of one warp: groups of stores that it has committed, and those of which memory is not written yet."""

    def __init__(self, warp: int, copies: Copies):
        self.warp, self.copies, self.committed, self.unwritten = warp, copies, 0, []

    def _store(self, shared, pointer_bytes, target, line):
        memory = self.copies.memory
        agent = memory.agents.stores(self.warp)
        memory.async_read([self.warp], np.unique(shared // 4), np.array([agent]), self.committed + 1, line)
        self.unwritten.append((self.committed + 1, target, pointer_bytes, memory.bytes[shared]))

    def box(self, descriptor, coordinates, at, line):
        target, item, base = self.copies.array(descriptor.base)
        offsets, inside, shared = places(descriptor, coordinates, item, at)
        self._store(_bytes(shared[inside], item), _bytes(base + offsets[inside], item), target, line)

    def bytes(self, pointer, at, size, line):
        assert pointer % 16 == 0 and at % 16 == 0 and size % 16 == 0, line
        target, _, base = self.copies.array(pointer)
        self._store(at + np.arange(size), base + np.arange(size), target, line)

    def commit(self):
        self.committed += 1

    def wait(self, left: int, read_only: bool):
        """Until at most so many groups are left that have not been read, or written."""
        done = self.committed - left
        memory = self.copies.memory
        memory.clocks.completed([self.warp], memory.agents.stores(self.warp), done)
        if not read_only:
            self.write(done)

    def write(self, done):
        for _, target, places, data in (store for store in self.unwritten if store[0] <= done):
            target[places] = data
        self.unwritten = [store for store in self.unwritten if store[0] > done]

    def exit(self):
        """Memory is written, but shared memory is another's now."""
        memory = self.copies.memory
        if memory.clocks.seen[self.warp, memory.agents.stores(self.warp)] < max((store[0] for store in self.unwritten), default=0):
            memory.faults["an exit before stores have read shared memory"] += 1
        self.write(self.committed)
