"""Scratch memory of forward and backward at one long length, as compiled for the local device: nothing is run."""

import dataclasses
from collections.abc import Iterable

import jax

from experiments.benchmarks.cases import Case, arguments
from experiments.benchmarks.rows import Suite
from experiments.benchmarks.timing import compile_case

LENGTH = 8192


def at_length(case: Case) -> Iterable[Case]:
    yield dataclasses.replace(case, shape=dataclasses.replace(case.shape, T=LENGTH), pass_name="forward_backward")


def measure(case: Case) -> dict:
    """The row of a program that is compiled and not run."""
    return case.work() | compile_case(case, jax.eval_shape(lambda: arguments(case)))[1]


SUITE = Suite(
    "memory",
    at_length,
    measure,
    {
        "T": lambda row: str(row["sizes"]["T"]),
        "temp MiB": lambda row: f"{row['temp_bytes'] / 2**20:.1f}",
        "arguments MiB": lambda row: f"{row['argument_bytes'] / 2**20:.1f}",
        "outputs MiB": lambda row: f"{row['output_bytes'] / 2**20:.1f}",
        "compile s": lambda row: f"{row['compile_s']:.1f}",
    },
)
