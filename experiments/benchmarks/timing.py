"""Seconds: each program compiled for the local device and repeated, between two matmuls that say what the machine gives."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.cases import Case, arguments, both_passes, program
from experiments.benchmarks.correctness import check
from experiments.benchmarks.rows import Suite

SECONDS = 3.0  # about how long a row is repeated for
REPETITIONS = 30  # at most


def compile_case(case: Case, values: tuple[dict, ...]):
    """The compiled program, and of its row the seconds that took and its memory in bytes."""
    start = time.perf_counter()
    compiled = jax.jit(program(case)).lower(*values).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return compiled, {
        "compile_s": seconds,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


def repeat(function: Callable[[], object], seconds: float, most: int) -> list[float]:
    """Seconds of each call until ``seconds`` are over. The first warms up, and counts only where it alone took that long."""
    times = []
    while not times or (sum(times) < seconds and len(times) <= most):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return times[1:] or times


@functools.cache
def _matmul(dtype: str):
    side = 2048 if jax.devices()[0].platform == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    return side, jax.jit(jnp.matmul).lower(x, x).compile(), x


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large square matmul on this machine, now."""
    side, matmul, x = _matmul(dtype)
    return 2 * side**3 / float(np.median(repeat(lambda: matmul(x, x), seconds=1.0, most=5)))


def measure(case: Case) -> dict:
    """The row of an operator: checked, then timed between two matmuls."""
    row = case.work() | check(case)
    if "failure" in row:
        return row
    values = arguments(case)
    compiled, compilation = compile_case(case, values)
    before = matmul_rate(case.dtype)
    times = repeat(lambda: compiled(*values), SECONDS, REPETITIONS)
    after = matmul_rate(case.dtype)
    lower, median, upper = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    rate = row["flops"] / median
    return row | compilation | {
        "median_s": median,
        "quartiles_s": [lower, upper],
        "repetitions": len(times),
        "flop_per_s": rate,
        "matmul_flop_per_s": [before, after],
        "matmul_share": rate / ((before + after) / 2),
    }  # fmt: skip


SUITE = Suite(
    "operators",
    both_passes,
    measure,
    {
        "median ms": lambda row: f"{row['median_s'] * 1e3:.2f}",
        "quartiles": lambda row: " ... ".join(f"{q * 1e3:.2f}" for q in row["quartiles_s"]),
        "GFLOP/s": lambda row: f"{row['flop_per_s'] / 1e9:.1f}",
        "of matmul": lambda row: f"{row['matmul_share']:.1%}",
        "GB/s": lambda row: f"{row['bytes'] / row['median_s'] / 1e9:.1f}",
        "temp MiB": lambda row: f"{row['temp_bytes'] / 2**20:.1f}",
        "compile s": lambda row: f"{row['compile_s']:.1f}",
        "error": lambda row: f"{max(row['errors'].values()):.1e}" if "errors" in row else "reference",
    },
)
