"""wgmma: products of bfloat16 in float32, operands in shared memory behind descriptors, the left one in registers too."""

from functools import cache, lru_cache

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANE, WARP, halves, widened
from tests.pallas_kernels.ptx.copies import swizzled

ROWS, DEPTH = 64, 16


@lru_cache(maxsize=4096)
def addresses(descriptor: int, size: int, transposed: bool) -> np.ndarray:
    """[size,16], of the elements of an operand [M or N, K]; PTX's canonical layouts with a swizzle of 128 bytes, one K of 16."""
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    assert descriptor >> 62 == 1 and (descriptor >> 49) & 7 == 0, "another swizzle, or a tile that is not aligned"
    m, k = np.arange(size)[:, None], np.arange(DEPTH)
    if transposed:  # tiles [8 of K, 64 of M]
        return swizzled(start + m // 64 * leading + k // 8 * stride + k % 8 * 128 + m % 64 * 2)
    return swizzled(start + m // 8 * stride + m % 8 * 128 + k * 2)  # tiles [8 of M, 64 of K]


def fragment(registers) -> np.ndarray:
    """[64,16] of four registers of two bfloat16 each."""
    out = np.zeros((ROWS, DEPTH), np.float32)
    for j, register in enumerate(registers):
        row, column = 16 * (LANE // WARP) + LANE % WARP // 4 + 8 * (j % 2), 2 * (LANE % 4) + 8 * (j // 2)
        out[row, column], out[row, column + 1] = map(widened, halves(register))
    return out


@cache
def accumulator(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column), each [128,count], of what each lane has of a sum [64,2*count]."""
    j = np.arange(count)
    row = (16 * (LANE // WARP) + LANE % WARP // 4)[:, None] + j % 4 // 2 * 8
    return row, (LANE % 4 * 2)[:, None] + j // 4 * 8 + j % 2


class Products:
    """Of one warpgroup, in groups."""

    def __init__(self, warps, memory):
        self.warps, self.memory, self.committed = warps, memory, 0

    def multiply(self, sums, left, right: int, transposed, line) -> np.ndarray:
        """sums [128,N/2] float32, left a descriptor or four registers -> the sums after it."""
        of_left, of_right = transposed
        right = addresses(right, 2 * sums.shape[1], bool(of_right))
        used = [right]
        if isinstance(left, int):
            used.append(addresses(left, ROWS, bool(of_left)))
        agents = self.memory.agents.products(self.warps)
        words = np.unique(np.concatenate(used) // 4)
        self.memory.async_read(self.warps, words, agents, self.committed + 1, line)
        matrix = self._matrix(used[1]) if len(used) > 1 else fragment(left)
        product = matrix @ self._matrix(right).T
        return sums + product[accumulator(sums.shape[1])]

    def _matrix(self, at):
        return widened(self.memory.bytes.view(np.uint16)[at // 2])

    def commit(self):
        self.committed += 1

    def wait(self, left: int):
        for warp in self.warps:  # of the others' shares no warp knows
            self.memory.clocks.completed([warp], self.memory.agents.products(warp), self.committed - left)
