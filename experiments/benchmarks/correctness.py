"""Whether an implementation is right: measured before anything else, and nothing else is measured where it is not."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.cases import Case, arguments, program

# Relative errors of whole arrays, ||out - reference|| / ||reference||. float32: sums of hundreds of terms in another order,
# amplified by recurrences, stay below; a missing term does not. bfloat16: a few roundings of 2^-9 in a row.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
WHOLE_T = 256  # shapes that are no longer are checked as they are
# All others at this length: at least two of the longest chunks or blocks that any implementation works in, and a part of another,
# so that what goes from one to the next is checked too. Those of products of matrices have 128 tokens, the others up to 1,024.
CHECKED_T = {"linear_scan": 2100, "gated_linear_attention": 300, "gated_delta_rule": 300, "attention": 2100, "causal_conv": 2100}


def shortened(case: Case):
    """The shape that a case is checked at."""
    return case.shape if case.shape.T <= WHOLE_T else dataclasses.replace(case.shape, T=CHECKED_T[case.operator])


@functools.cache
def _errors(case: Case) -> dict[str, float]:
    expected = _expected(dataclasses.replace(case, implementation="reference"))
    outputs = jax.jit(program(case))(*arguments(case))
    return {name: relative_error(out, expected[name]) for name, out in outputs.items()}


@functools.cache
def _expected(case: Case) -> dict[str, jax.Array]:
    return jax.jit(program(case))(*_exact(case))


def _exact(case: Case) -> tuple[dict, ...]:
    """The arguments in float32."""
    floating, others, cotangents = arguments(case)
    floating, cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), (floating, cotangents))
    return floating, others, cotangents


def relative_error(out, expected) -> float:
    """||out - expected|| / ||expected||, in float64."""
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(out - expected) / (scale if scale else 1.0))


def check(case: Case, smaller: Callable | None = None) -> dict:
    """Of a row: the errors and what they are held against; "failure" where they are too large. Empty for the reference itself.

    The errors are relative, of outputs and gradients to those of the float32 reference, at the ``smaller`` of the case's shape, or
    where that is None as :func:`shortened`.
    """
    if case.implementation == "reference":
        return {}
    compared = _compared(case, smaller)
    return verdict(_errors(compared), case.dtype, compared.shape)


def compile_check(case: Case, smaller: Callable | None = None) -> None:
    """Compile what :func:`check` runs, and run none of it."""
    compared = _compared(case, smaller)
    reference = dataclasses.replace(compared, implementation="reference")
    for program_of, values in ((compared, arguments(compared)), (reference, _exact(reference))):
        jax.jit(program(program_of)).lower(*values).compile()


def _compared(case: Case, smaller: Callable | None) -> Case:
    shape = smaller(case.shape) if smaller else shortened(case)
    return dataclasses.replace(case, shape_name="", shape=shape, pass_name="forward_backward")


def verdict(found: dict[str, float], dtype: str, checked) -> dict:
    """Of a row: relative errors found at a shape and what they are held against; "failure" where they are too large."""
    tolerance = TOLERANCE[dtype]
    # JSON has no nan: null stands for what is not finite.
    row = {"errors": {name: error if np.isfinite(error) else None for name, error in found.items()}}
    row |= {"tolerance": tolerance, "checked_shape": dataclasses.asdict(checked)}
    if not all(error <= tolerance for error in found.values()):  # a nan is not below it
        worst = ", ".join(f"{name} {error:.1e}" for name, error in found.items() if not error <= tolerance)
        row["failure"] = f"not measured, errors above {tolerance:g}: {worst}"
    return row
