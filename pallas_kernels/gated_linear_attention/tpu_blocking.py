"""How many tokens and heads a step of the TPU kernels' grid takes, by generation: tuned for both recurrences with matrix states."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms


class Blocking(NamedTuple):
    """tokens: C, of a chunk. heads: the most that a step of the grid takes. state_bytes: the most that their states take as operands.

    vmem_bytes: the most that a kernel may take, where that is more than the compiler allows by itself.
    """

    tokens: int
    heads: int
    state_bytes: int
    vmem_bytes: int | None = None

    def heads_a_step(self, B: int, heads: int, state_bytes: int) -> int:
        """The largest number that divides ``heads``, is within the limits for states of ``state_bytes`` a head, and leaves no core idle."""
        most = min(self.heads, max(1, self.state_bytes // state_bytes), max(1, B * heads // platforms.cores()))
        return next(n for n in range(most, 0, -1) if heads % n == 0)

    @property
    def compiler_params(self) -> pltpu.CompilerParams:
        """Of a grid (B, groups of heads, chunks in order)."""
        order = ("parallel", "parallel", "arbitrary")
        return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=self.vmem_bytes)


# Within the VMEM of all generations; that tuned, for bfloat16, within the 64 MiB and more that a core has since v5.
DEFAULT = Blocking(tokens=128, heads=4, state_bytes=2**18)
LARGER = Blocking(tokens=128, heads=8, state_bytes=2**21, vmem_bytes=48 * 2**20)
TUNED = dict.fromkeys(("v5e", "v5p", "v6e", "tpu7x"), LARGER)


def blocking(dtype) -> Blocking:
    """For operands of ``dtype``, on the generation that programs are traced for."""
    return TUNED.get(platforms.generation(), DEFAULT) if dtype == jnp.bfloat16 else DEFAULT
