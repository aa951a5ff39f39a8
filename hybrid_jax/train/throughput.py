"""How fast a run goes, beside how fast its devices could go."""

import re
import time

import jax
import jax.numpy as jnp

from hybrid_jax import costs
from hybrid_jax.chips import CHIPS
from hybrid_jax.config import RunConfig
from pallas_kernels.platforms import GENERATIONS


def peak_flops(devices: int | None = None) -> tuple[float, str]:
    """FLOP/s of so many ``devices`` together (None: of all), and where the number is from: the data sheet, or else a matmul timed here.

    Of a CPU, whose devices are virtual ones of one machine, that of all machines.
    """
    device, count = jax.devices()[0], devices or jax.device_count()
    if name := listed(device.device_kind):
        return CHIPS[name].flop_per_s * count, f"{name} data sheet"
    if device.platform == "cpu":
        return matmul_rate(jnp.float32, 1024) * jax.process_count(), "its measured float32 matmul rate"
    return matmul_rate(jnp.bfloat16, 8192) * count, "its measured bfloat16 matmul rate"


def listed(kind: str) -> str | None:
    """The chip of `CHIPS` that JAX calls ``kind``; None where none is, or ``kind`` is a slice of one ("... MIG 1g.10gb")."""
    if re.search(r"\bMIG\b", kind):
        return None
    # Whole words: an RTX A1000 is no A100.
    return GENERATIONS.get(kind) or next((name for name in CHIPS if re.search(rf"\b{name}\b", kind.lower())), None)


def matmul_rate(dtype, size: int) -> float:
    """FLOP/s of a square matmul on the first device, the best of five."""
    x = jnp.ones((size, size), dtype)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def training_flops(config: RunConfig) -> float:
    """FLOPs of the model in one step: forward once and backward twice as much, over every token."""
    return 3 * costs.flops_per_token(config.model, config.data.window) * config.train.batch * config.data.window
