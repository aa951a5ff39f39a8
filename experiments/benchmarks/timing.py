"""Seconds: each program compiled for the local device and repeated, between two matmuls that say what the machine gives."""

import time

import jax
import jax.numpy as jnp

from experiments.benchmarks.batches import batches, summary
from experiments.benchmarks.cases import Case, arguments, both_passes, program
from experiments.benchmarks.correctness import check
from experiments.benchmarks.rows import Suite

SECONDS = 3.0  # about how long a row is repeated for


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


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large product of random matrices on this machine, now."""
    side = 2048 if jax.devices()[0].platform == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    return 2 * side**3 / summary(batches(lambda: product(x, x), jax.block_until_ready))["median_s"]


def measure(case: Case) -> dict:
    """The row of an operator: checked, then timed between two matmuls."""
    row = case.work() | check(case)
    if "failure" in row:
        return row
    values = arguments(case)
    compiled, compilation = compile_case(case, values)
    before = matmul_rate(case.dtype)
    row |= compilation | summary(batches(lambda: compiled(*values), jax.block_until_ready, SECONDS))
    after = matmul_rate(case.dtype)
    rate = row["flops"] / row["median_s"]
    return row | {"flop_per_s": rate, "matmul_flop_per_s": [before, after], "matmul_share": rate / ((before + after) / 2)}


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
