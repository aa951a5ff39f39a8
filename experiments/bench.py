"""Measure every operator and implementation, after checking that it is right.

    python -m experiments.bench                                                  # time: every operator, implementation and shape
    python -m experiments.bench --operators=causal_conv --shapes='*340m' --dtype=bfloat16
    python -m experiments.bench --suite=memory                                   # scratch memory at T = 8192; compiles only
    python -m experiments.bench --target=tpu:v6e --dtype=bfloat16                # a TPU's schedule, compiled without a TPU
    python -m experiments.bench --suite=decode                                   # a token's time and the cache by context, with a plot
    python -m experiments.bench --suite=decode --configs=gla_r6,transformer --contexts=4096,32768 --batch=8

Each row is one implementation at one named shape of `pallas_kernels/<operator>/shapes.py`, forward alone or forward and
backward. It is printed, and appended as a line of JSON to --output with the device, versions and git revision it came from.
FLOPs are the chunked algorithm's own matmuls, three times the forward's with the backward pass; `matmul_share` is the row's
FLOP/s over that of a plain matmul, measured right before and after it. An implementation that does not give the reference's
outputs and gradients is not measured: its row holds the errors, and the exit status is 1.

--suite=decode measures whole models, with random parameters: the prompt read in chunks, then token by token as experiments.generate
does. It takes --configs, --contexts and --batch in place of the operators' flags, and draws decode_<platform>.png beside its rows.

With --target, nothing is timed: each program is compiled ahead of time for one chip of a TPU generation, and a row holds the
bundles of the compiler's schedule (about a cycle each), the bytes moved, and which of the two takes longer. It needs the TPU
compiler, as in pip install -e '.[tpu]'.
"""

import contextlib
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from experiments.benchmarks import cases, correctness, decode, memory, rows, timing, tpu_static

SUITES = {suite.name: suite for suite in (timing.SUITE, memory.SUITE, decode.SUITE)}

_SUITE = flags.DEFINE_enum("suite", "operators", sorted(SUITES), "What to measure on the local device.")
_TARGET = flags.DEFINE_enum("target", None, sorted(tpu_static.TARGETS), "A chip to compile for in place of measuring on the local device.")
_OPERATORS = flags.DEFINE_list("operators", [], f"Of {', '.join(cases.OPERATORS)}; all by default.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", [], "Such as xla, pallas; all by default, and those two with --target.")
_SHAPES = flags.DEFINE_list("shapes", [], "Names from the operators' shapes.py, such as *340m; all by default.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(correctness.TOLERANCE), "Of the floating-point arguments.")
_CONFIGS = flags.DEFINE_list(
    "configs", ["gla_pure:tiny", "gla_r6:tiny", "transformer:tiny"], "Of --suite=decode: models of experiments/configs, NAME:SIZE."
)
_CONTEXTS = flags.DEFINE_list("contexts", ["512", "2048", "8192"], "Of --suite=decode: tokens of context.")
_BATCH = flags.DEFINE_integer("batch", 4, "Of --suite=decode: texts written side by side.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to append to; experiments/results/<platform or tpu_static>.jsonl by default.")


def main(argv) -> int:
    logging.set_verbosity(logging.WARNING)
    with contextlib.ExitStack() as stack:
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; the flags are in --help")
            implementations = _IMPLEMENTATIONS.value
            if _TARGET.value:
                suite = stack.enter_context(tpu_static.suite(_TARGET.value))
                implementations, results = implementations or ["xla", "pallas"], suite.name
            else:
                suite, results = SUITES[_SUITE.value], jax.devices()[0].platform
            selected = _models() if suite is decode.SUITE else _operators(implementations, results)
        except (ValueError, tpu_static.NoCompiler) as error:
            sys.exit(f"experiments.bench: {error}")
        output = Path(_OUTPUT.value or Path(__file__).parent / "results" / f"{results}.jsonl")
        # Operators' float32 rows are float32 throughout: TPUs and GPUs would multiply with fewer bits by default.
        exact = _DTYPE.value == "float32" and suite is not decode.SUITE
        stack.enter_context(jax.default_matmul_precision("highest" if exact else "default"))
        done = rows.run([case for one in selected for case in suite.cases(one)], suite, output)
    if suite is decode.SUITE:
        print(f"drawn in {decode.plot(done, output.with_name(f'decode_{results}.png'))}")
    failures = [row for row in done if "failure" in row]
    print(f"{len(done)} rows, {len(failures)} of them failures, appended to {output}")
    return 1 if failures else 0


def _models() -> list[decode.Case]:
    return decode.select(_CONFIGS.value, _CONTEXTS.value, _BATCH.value)


def _operators(implementations: list[str], results: str) -> list[cases.Case]:
    selected = cases.select(_OPERATORS.value, implementations, _SHAPES.value, _DTYPE.value)
    if not implementations and results == "cpu":  # where kernels are interpreted: their time says nothing
        selected = [case for case in selected if case.implementation != "pallas"]
    return selected


if __name__ == "__main__":
    app.run(main)
