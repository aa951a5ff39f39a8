"""Measure every operator and implementation, after checking that it is right.

    python -m experiments.bench                                                  # time: every operator, implementation and shape
    python -m experiments.bench --operators=causal_conv --shapes='*340m' --dtype=bfloat16
    python -m experiments.bench --suite=memory                                   # scratch memory at T = 8192; compiles only
    python -m experiments.bench --target=tpu:v6e --dtype=bfloat16                # a TPU's schedule, compiled without a TPU
    python -m experiments.bench --target=tpu:v6e --suite=step --shapes='*340m'   # whole training steps: kernels, memory

Each row is one implementation at one named shape of `pallas_kernels/<operator>/shapes.py`, forward alone or forward and
backward. It is printed, and appended as a line of JSON to --output with the device, versions and git revision it came from.
FLOPs are the chunked algorithm's own matmuls, three times the forward's with the backward pass; `matmul_share` is the row's
FLOP/s over that of a plain matmul, measured right before and after it. An implementation that does not give the reference's
outputs and gradients is not measured: its row holds the errors, and the exit status is 1.

With --target, nothing is timed: each program is compiled ahead of time for one chip of a TPU generation, and a row holds the
bundles of the compiler's schedule (about a cycle each), the bytes moved, and which of the two takes longer. It needs the TPU
compiler, as in pip install -e '.[tpu]'.
"""

import contextlib
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from experiments.benchmarks import cases, correctness, memory, rows, steps, timing, tpu_static

SUITES = {suite.name: suite for suite in (timing.SUITE, memory.SUITE)}
TARGET_SUITES = {"operators": tpu_static.suite, "step": steps.suite}

_SUITE = flags.DEFINE_enum("suite", "operators", sorted({*SUITES, *TARGET_SUITES}), "What to measure.")
_TARGET = flags.DEFINE_enum("target", None, sorted(tpu_static.TARGETS), "A chip to compile for in place of measuring on the local device.")
_OPERATORS = flags.DEFINE_list("operators", [], f"Of {', '.join(cases.OPERATORS)}; all by default.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", [], "Such as xla, pallas; all by default, and those two with --target.")
_SHAPES = flags.DEFINE_list("shapes", [], "Names from the operators' shapes.py, such as *340m; all by default.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(correctness.TOLERANCE), "Of the floating-point arguments.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to append to; experiments/results/<platform or tpu_static>.jsonl by default.")


def main(argv) -> int:
    logging.set_verbosity(logging.WARNING)
    with contextlib.ExitStack() as stack:
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; the flags are in --help")
            suite, results = _suite(stack)
            selected = steps.select(_SHAPES.value) if _SUITE.value == "step" else _operators(results)
        except (ValueError, tpu_static.NoCompiler) as error:
            sys.exit(f"experiments.bench: {error}")
        output = Path(_OUTPUT.value or Path(__file__).parent / "results" / f"{results}.jsonl")
        # float32 rows are float32 throughout: TPUs and GPUs would multiply with fewer bits by default.
        stack.enter_context(jax.default_matmul_precision("highest" if _DTYPE.value == "float32" else "default"))
        done = rows.run([case for one in selected for case in suite.cases(one)], suite, output)
    failures = [row for row in done if "failure" in row]
    print(f"{len(done)} rows, {len(failures)} of them failures, appended to {output}")
    return 1 if failures else 0


def _suite(stack: contextlib.ExitStack) -> tuple[rows.Suite, str]:
    """The suite that is asked for, and the name of the file its rows go to. Raises ValueError where there is no such one."""
    on = TARGET_SUITES if _TARGET.value else SUITES
    if _SUITE.value not in on:
        remedy = "is measured on the local device: leave out --target" if _TARGET.value else "needs a --target"
        raise ValueError(f"--suite={_SUITE.value} {remedy}")
    if _TARGET.value:
        return stack.enter_context(on[_SUITE.value](_TARGET.value)), "tpu_static"
    return on[_SUITE.value], jax.devices()[0].platform


def _operators(results: str) -> list[cases.Case]:
    """The operators' cases that are asked for."""
    implementations = _IMPLEMENTATIONS.value or (["xla", "pallas"] if _TARGET.value else [])
    selected = cases.select(_OPERATORS.value, implementations, _SHAPES.value, _DTYPE.value)
    if not implementations and results == "cpu":  # where kernels are interpreted: their time says nothing
        selected = [case for case in selected if case.implementation != "pallas"]
    return selected


if __name__ == "__main__":
    app.run(main)
