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
backward. It is printed, and appended as a line of JSON to --output with the device, versions and git revision it came from; rows to be
kept with the code go to one of its own files, as with --output=experiments/results/cpu.jsonl.
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
pip install -e '.[cuda13]', and, to count instructions, nvidia-cuda-nvdisasm.
"""

import contextlib
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.compiled import targets
from hybrid_jax.amounts import count
from hybrid_jax.config import ConfigError

CASES = ("operators", "implementations", "shapes", "dtype")  # flags that say what of the operators is measured
TAKES = {"decode": ("configs", "contexts", "batch"), "step": ("configs",), "gpu": ("operators", "shapes", "configs")}  # and those of suites
HERE = ("operators", "memory", "decode", "gpu")  # suites that the local device measures
AHEAD = ("operators", "step")  # and those of a --target
TARGETS = {"tpu": targets.TPUS, "gpu": targets.GPUS}

_SUITE = flags.DEFINE_enum(
    "suite",
    "operators",
    sorted({*HERE, *AHEAD}),
    "What to measure: the operators' time or memory, how models decode, all at once on a GPU, or, with --target, a training step.",
)
_TARGETS = flags.DEFINE_list("target", [], f"Chips to compile for in place of measuring here: {', '.join(targets.TPUS | targets.GPUS)}.")
_OPERATORS = flags.DEFINE_list("operators", [], "Operators by their folders in pallas_kernels, such as linear_scan; all by default.")
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", [], "Implementations of the operators, such as xla; all by default, with --target xla and pallas."
)
_SHAPES = flags.DEFINE_list("shapes", [], "Shapes of the operators by their names in shapes.py, such as *340m; all by default.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "The dtype of the operators' floating-point arguments.")
_CONFIGS = flags.DEFINE_list("configs", [], "Of --suite=decode, gpu and step: models of experiments/configs, such as gla_r6:1b3.")
_CONTEXTS = flags.DEFINE_list("contexts", ["512", "2048", "8192"], "Of --suite=decode: tokens read before those that are timed.")
_BATCH = flags.DEFINE_integer("batch", 4, "Of --suite=decode: texts written side by side.", lower_bound=1)
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON lines file that rows are appended to; results/NAME.jsonl, by platform or target, if not given."
)


def main() -> int:
    kind = _check_flags()

    import jax

    from experiments.benchmarks import rows

    with contextlib.ExitStack() as stack:
        try:
            selected = _selected()
            suites, results = _suites(stack, kind)
        except ValueError as error:  # about a name, and it says which
            raise ConfigError(str(error)) from None
        if _SUITE.value in ("operators", "memory") and results == "cpu" and not _IMPLEMENTATIONS.value:
            selected = [case for case in selected if case.implementation != "pallas"]  # interpreted there: their time says nothing
        output = Path(_OUTPUT.value or f"results/{results}.jsonl")
        # Operators' float32 rows are float32 throughout: TPUs and GPUs would multiply with fewer bits by default.
        exact = _DTYPE.value == "float32" and _SUITE.value not in ("decode", "gpu")
        stack.enter_context(jax.default_matmul_precision("highest" if exact else "default"))
        done = []
        for suite in suites:
            done += rows.run([case for one in selected for case in suite.cases(one)], suite, output)
            if suite.draw:
                print(f"drawn in {suite.draw(done, output)}")
    failures = [row for row in done if "failure" in row]
    print(f"{count(len(done), 'row')}, {count(len(failures), 'failure')} among them, appended to {output}")
    return 1 if failures else 0


def _check_flags() -> str | None:
    """The kind of the targets, "tpu" or "gpu"; None where there are none. Raises ConfigError for flags that do not go together."""
    takes = TAKES.get(_SUITE.value, CASES)
    for name in sorted({name for names in (CASES, *TAKES.values()) for name in names}.difference(takes)):
        if flags.FLAGS[name].present:
            given = ", ".join(f"--{name}" for name in takes)
            raise ConfigError(f"--{name} has no meaning for --suite={_SUITE.value}, which takes {given}")
    kinds = dict.fromkeys(_kind(target) for target in _TARGETS.value)
    if len(kinds) > 1:
        raise ConfigError(f"--target={','.join(_TARGETS.value)}: TPUs and GPUs have rows of their own; take one kind at a time")
    if _SUITE.value not in (AHEAD if kinds else HERE):
        remedy = "is measured on the local device: leave out --target" if kinds else "needs a --target"
        raise ConfigError(f"--suite={_SUITE.value} {remedy}")
    if "tpu" in kinds:
        targets.need_libtpu(_TARGETS.value[0])
    if "gpu" in kinds:
        targets.cuda_root()
    return next(iter(kinds), None)


def _kind(target: str) -> str:
    for kind, known in TARGETS.items():
        if target in known:
            return kind
    raise ConfigError(f"--target={target}: no such chip; choose from {', '.join(targets.TPUS | targets.GPUS)}")


def _selected() -> list:
    """The suite's cases that are asked for. Raises ValueError where there are none of a name."""
    if _SUITE.value == "decode":
        from experiments.benchmarks import decode

        return decode.select(_CONFIGS.value or decode.CONFIGS, _CONTEXTS.value, _BATCH.value)
    if _SUITE.value == "gpu":
        from experiments.benchmarks import gpu

        return gpu.cases(_OPERATORS.value, _SHAPES.value, _CONFIGS.value)
    if _SUITE.value == "step":
        from experiments.benchmarks import steps

        return steps.select(_CONFIGS.value or steps.CONFIGS)
    from experiments.benchmarks import cases

    implementations = _IMPLEMENTATIONS.value or (["xla", "pallas"] if _TARGETS.value else [])
    return cases.select(_OPERATORS.value, implementations, _SHAPES.value, _DTYPE.value)


def _suites(stack: contextlib.ExitStack, kind: str | None) -> tuple[list, str]:
    """The suite that is asked for, of each target, and the name of its rows' file."""
    from experiments.benchmarks import decode, gpu, gpu_static, gpu_steps, memory, steps, timing, tpu_static

    if kind:
        ahead = {
            "tpu": {"operators": tpu_static.suite, "step": steps.suite},
            "gpu": {"operators": gpu_static.suite, "step": gpu_steps.static_suite},
        }[kind]
        return [stack.enter_context(ahead[_SUITE.value](target)) for target in _TARGETS.value], f"{kind}_static"
    if _SUITE.value == "gpu":
        return stack.enter_context(gpu.suites()), "gpu"

    import jax

    here = {"operators": timing.SUITE, "memory": memory.SUITE, "decode": decode.SUITE}
    return [here[_SUITE.value]], jax.devices()[0].platform


if __name__ == "__main__":
    cli.start_without_config(main)
