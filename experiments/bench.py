"""Measure every operator and implementation, after checking that it is right.

    python -m experiments.bench                                                  # time: every operator, implementation and shape
    python -m experiments.bench --operators=causal_conv --shapes='*340m' --dtype=bfloat16
    python -m experiments.bench --suite=memory                                   # scratch memory at T = 8192; compiles only
    python -m experiments.bench --target=tpu:v6e,tpu:v5p --dtype=bfloat16        # TPUs' schedules, compiled without a TPU
    python -m experiments.bench --suite=gpu                                      # on a GPU: operators and steps beside fla's Triton
    python -m experiments.bench --target=gpu:h200 --dtype=bfloat16               # an H200's instructions and bytes, without one
    python -m experiments.bench --suite=decode                                   # a token's time and the cache by context, with a plot
    python -m experiments.bench --suite=decode --configs=gla_r6,transformer --contexts=4096,32768 --batch=8
    python -m experiments.bench --target=tpu:v6e --suite=step --configs=gla_r6:1b3   # whole training steps: kernels, memory

Each row is one implementation at one named shape of `pallas_kernels/<operator>/shapes.py`, forward alone or forward and
backward. It is printed, and appended as a line of JSON to --output with the device, versions and git revision it came from.
FLOPs are the chunked algorithm's own matmuls, three times the forward's with the backward pass; `matmul_share` is the row's
FLOP/s over that of a plain matmul, measured right before and after it. An implementation that does not give the reference's
outputs and gradients is not measured: its row holds the errors, and the exit status is 1.

--suite=decode measures whole models, with random parameters: the prompt read in chunks, then token by token as experiments.generate
does. It takes --configs, --contexts and --batch in place of the operators' flags, and draws decode_<platform>.png beside its rows.

--suite=gpu, on a GPU, measures operators and training steps at the sizes of the study's models, 32k tokens at once, bfloat16, beside
flash-linear-attention's where that is installed (pip install -e '.[parity]'). What is wanted most comes first, the recurrences and
attention at 2,048 tokens and the steps of 340M hybrids at 6:1. It stops after about eight minutes; given again it goes on.

With --target, nothing is timed: each program is compiled ahead of time for one chip, and a row holds what it costs there. On a TPU: the
bundles of the compiler's schedule (about a cycle each), the bytes moved, and which of the two takes longer; a picture of the target's
rows is drawn beside them. With --suite=step a row is a training step of one of --configs on all chips of a small host: what it holds
and moves, and which implementations it runs. It needs the TPU compiler, as in pip install -e '.[tpu]'. On a GPU: each kernel's registers,
spills, shared memory and instructions, the bytes moved, and which of these binds, the models' shapes at 32k tokens, in rows of 2,048 and
of 32,768; with --suite=step a row is a training step of one of --configs on one card, 32k tokens. It needs JAX's CUDA wheels, as in
pip install -e '.[cuda13]', and to count instructions nvidia-cuda-nvdisasm.
"""

import contextlib
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from experiments.benchmarks import cases, correctness, decode, gpu, gpu_static, gpu_steps, memory, rows, steps, timing, tpu_static

SUITES = {suite.name: suite for suite in (timing.SUITE, memory.SUITE, decode.SUITE)}
TARGETS = tpu_static.TARGETS | gpu_static.TARGETS
TARGET_SUITES = {
    "tpu": {"operators": tpu_static.suite, "step": steps.suite},
    "gpu": {"operators": gpu_static.suite, "step": gpu_steps.static_suite},
}

CASES = ("operators", "implementations", "shapes", "dtype")  # flags that say what of the operators is measured
TAKES = {"decode": ("configs", "contexts", "batch"), "step": ("configs",), "gpu": ("operators", "shapes", "configs")}  # and those of suites

_SUITE = flags.DEFINE_enum("suite", "operators", sorted({*SUITES, "gpu", *TARGET_SUITES["tpu"]}), "What to measure.")
_TARGETS = flags.DEFINE_list("target", [], f"Chips to compile for in place of measuring here: {', '.join(TARGETS)}.")
_OPERATORS = flags.DEFINE_list("operators", [], f"Of {', '.join(cases.OPERATORS)}; all by default.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", [], "Such as xla, pallas; all by default, and those two with --target.")
_SHAPES = flags.DEFINE_list("shapes", [], "Names from the operators' shapes.py, such as *340m; all by default.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(correctness.TOLERANCE), "Of the floating-point arguments.")
_CONFIGS = flags.DEFINE_list("configs", [], "Of --suite=decode, gpu and step: models of experiments/configs, as NAME:SIZE.")
_CONTEXTS = flags.DEFINE_list("contexts", ["512", "2048", "8192"], "Of --suite=decode: tokens of context.")
_BATCH = flags.DEFINE_integer("batch", 4, "Of --suite=decode: texts written side by side.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to append to; by default one of experiments/results, by platform or target.")


def main(argv) -> int:
    logging.set_verbosity(logging.WARNING)
    with contextlib.ExitStack() as stack:
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; the flags are in --help")
            _check_flags()
            suites, results = _suites(stack)
            selected = _selected(results)
        except (ValueError, tpu_static.NoCompiler) as error:
            sys.exit(f"experiments.bench: {error}")
        output = Path(_OUTPUT.value or Path(__file__).parent / "results" / f"{results}.jsonl")
        # Operators' float32 rows are float32 throughout: TPUs and GPUs would multiply with fewer bits by default.
        exact = _DTYPE.value == "float32" and _SUITE.value not in ("decode", "gpu")
        stack.enter_context(jax.default_matmul_precision("highest" if exact else "default"))
        done = []
        for suite in suites:
            done += rows.run([case for one in selected for case in suite.cases(one)], suite, output)
            if suite.draw:
                print(f"drawn in {suite.draw(done, output)}")
    failures = [row for row in done if "failure" in row]
    print(f"{len(done)} rows, {len(failures)} of them failures, appended to {output}")
    return 1 if failures else 0


def _check_flags() -> None:
    """Raise ValueError for a flag that the suite does not take."""
    takes = TAKES.get(_SUITE.value, CASES)
    for name in {name for names in (CASES, *TAKES.values()) for name in names}.difference(takes):
        if flags.FLAGS[name].present:
            given = ", ".join(f"--{name}" for name in takes)
            raise ValueError(f"--{name} has no meaning for --suite={_SUITE.value}, which takes {given}")


def _suites(stack: contextlib.ExitStack) -> tuple[list[rows.Suite], str]:
    """The suite that is asked for, of each target, and the name of its rows' file. Raises ValueError where there is no such one."""
    targets = _TARGETS.value
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"--target={target}: no such chip; choose from {', '.join(TARGETS)}")
    kinds = {target.split(":")[0] for target in targets}
    if len(kinds) > 1:
        raise ValueError(f"--target={','.join(targets)}: TPUs and GPUs have rows of their own; take one kind at a time")
    kind = "".join(kinds)
    on = TARGET_SUITES[kind] if kind else {*SUITES, "gpu"}
    if _SUITE.value not in on:
        elsewhere = any(_SUITE.value in suites for suites in TARGET_SUITES.values())
        remedy = "needs a --target" if elsewhere else "is measured on the local device: leave out --target"
        raise ValueError(f"--suite={_SUITE.value} {remedy}")
    if targets:
        return [stack.enter_context(on[_SUITE.value](target)) for target in targets], f"{kind}_static"
    if _SUITE.value == "gpu":
        return stack.enter_context(gpu.suites()), "gpu"
    return [SUITES[_SUITE.value]], jax.devices()[0].platform


def _selected(results: str) -> list:
    """The suite's cases that are asked for."""
    if _SUITE.value == "decode":
        return decode.select(_CONFIGS.value or decode.CONFIGS, _CONTEXTS.value, _BATCH.value)
    if _SUITE.value == "gpu":
        return gpu.cases(_OPERATORS.value, _SHAPES.value, _CONFIGS.value)
    if _SUITE.value == "step":
        return steps.select(_CONFIGS.value or steps.CONFIGS)
    implementations = _IMPLEMENTATIONS.value or (["xla", "pallas"] if _TARGETS.value else [])
    selected = cases.select(_OPERATORS.value, implementations, _SHAPES.value, _DTYPE.value)
    if not implementations and results == "cpu":  # where kernels are interpreted: their time says nothing
        selected = [case for case in selected if case.implementation != "pallas"]
    return selected


if __name__ == "__main__":
    app.run(main)
