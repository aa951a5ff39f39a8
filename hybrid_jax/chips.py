"""What a chip of each kind can do at most, by its maker's own pages: known before JAX is imported."""

from typing import NamedTuple

GIB = 2**30
GPU_SHARE = 0.95  # of a GPU's memory, which training takes unless the environment says otherwise; JAX by itself: 0.75


class Chip(NamedTuple):
    """Of what is one device to JAX. Memory and its rate only of chips that programs are compiled for ahead of time."""

    flop_per_s: float  # dense bfloat16
    memory_bytes: int | None = None
    bytes_per_s: float | None = None  # to and from that memory


# TPUs: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x, in November 2026. GPUs: NVIDIA's data sheets, half of what
# they give with sparsity. The cards of PCI slots are slower than what is named like them, and stand before it: the first name counts
# that what JAX calls a card has in it.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9),
    "v6e": Chip(918e12, 32 * GIB, 1638e9),
    "tpu7x": Chip(2307e12 / 2, 192 * GIB // 2, 7380e9 / 2),  # a chip is two devices
    "a100": Chip(312e12),
    "h100 pcie": Chip(756e12),
    "h100 nvl": Chip(835e12),
    "h100": Chip(989e12, 80 * 10**9, 3.35e12),
    "h200 nvl": Chip(835e12),
    "h200": Chip(989e12, 141 * 10**9, 4.8e12),
    "gh200": Chip(989e12),
    "gb200": Chip(2500e12),
    "b200": Chip(2250e12),
}
