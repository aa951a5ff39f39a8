"""Time every operator and implementation, after checking that it is right.

    python -m experiments.bench                                                  # every operator, implementation and shape
    python -m experiments.bench --operators=causal_conv --shapes='*340m' --dtype=bfloat16
    python -m experiments.bench --suite=memory                                   # scratch memory at T = 8192; compiles only

Each row is one implementation at one named shape of `pallas_kernels/<operator>/shapes.py`, forward alone or forward and
backward. It is printed, and appended as a line of JSON to --output with the device, versions and git revision it came from.
FLOPs are the chunked algorithm's own matmuls, three times the forward's with the backward pass; `matmul_share` is the row's
FLOP/s over that of a plain matmul, measured right before and after it. An implementation that does not give the reference's
outputs and gradients is not timed: its row holds the errors, and the exit status is 1.
"""

import dataclasses
import fnmatch
import functools
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

OPERATORS = ("linear_scan", "gated_linear_attention", "gated_delta_rule", "attention", "causal_conv")
PASSES = ("forward", "forward_backward")
# Relative errors of whole arrays, ||out - reference|| / ||reference||. float32: sums of hundreds of terms in another order,
# amplified by recurrences, stay below; a missing term does not. bfloat16: a few roundings of 2^-9 in a row.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
CHECKED_T = 256  # longer shapes are checked at this length
MEMORY_T = 8192
SECONDS = 3.0  # about how long a row is repeated for
REPETITIONS = 30  # at most


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to be measured."""

    operator: str
    implementation: str
    shape_name: str
    shape: object  # a frozen dataclass of the operator's shapes.py, with T among its fields
    dtype: str
    pass_name: str

    def __str__(self):
        return f"{self.operator} {self.implementation} {self.shape_name} {self.dtype} {self.pass_name}"

    @property
    def shapes(self) -> ModuleType:
        return importlib.import_module(f"pallas_kernels.{self.operator}.shapes")

    def work(self) -> dict[str, int]:
        """FLOPs and bytes by the operator's own count; a backward pass is taken to be two forward ones."""
        passes = 3 if self.pass_name == "forward_backward" else 1
        return {"flops": passes * self.shapes.flops(self.shape), "bytes": passes * self.shapes.bytes_moved(self.shape, self.dtype)}


def api(operator: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.{operator}.api")


# What is run: the same program is checked and timed.


def program(case: Case) -> Callable[..., dict[str, jax.Array]]:
    """A function of ``arguments(case)``: the outputs and, with the backward pass, the gradient of every floating argument, by name."""

    def forward(floating, others):
        outputs = getattr(api(case.operator), case.operator)(**floating, **others, implementation=case.implementation)
        return dict(zip(("output", "final_state"), jax.tree.leaves(outputs), strict=False))  # attention has no state

    def forward_backward(floating, others, cotangents):
        outputs, pull = jax.vjp(lambda floating: forward(floating, others), floating)
        return outputs | {f"gradient of {name}": a for name, a in pull(cotangents)[0].items()}

    return {"forward": forward, "forward_backward": forward_backward}[case.pass_name]


def arguments(case: Case) -> tuple[dict, ...]:
    """The program's arguments: floating point, others and, for the backward pass, the outputs' cotangents."""
    values = case.shapes.inputs(case.shape, jax.random.key(0), jnp.dtype(case.dtype))
    floating = {name: a for name, a in values.items() if jnp.issubdtype(jnp.result_type(a), jnp.floating)}
    others = {name: a for name, a in values.items() if name not in floating}
    if case.pass_name == "forward":
        return floating, others
    outputs = jax.eval_shape(program(dataclasses.replace(case, pass_name="forward")), floating, others)
    keys = dict(zip(outputs, jax.random.split(jax.random.key(1), len(outputs)), strict=True))
    return floating, others, {name: jax.random.normal(keys[name], a.shape, a.dtype) for name, a in outputs.items()}


# Correctness


def errors(case: Case) -> dict[str, float]:
    """Relative errors of outputs and gradients against the float32 reference, at no more than ``CHECKED_T`` tokens."""
    return _errors(dataclasses.replace(case, shape=_shortened(case.shape), pass_name="forward_backward"))


def _shortened(shape):
    return dataclasses.replace(shape, T=min(shape.T, CHECKED_T))


@functools.cache
def _errors(case: Case) -> dict[str, float]:
    expected = _expected(dataclasses.replace(case, implementation="reference"))
    outputs = jax.jit(program(case))(*arguments(case))
    return {name: _relative_error(out, expected[name]) for name, out in outputs.items()}


@functools.cache
def _expected(case: Case) -> dict[str, jax.Array]:
    floating, others, cotangents = arguments(case)
    floating, cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), (floating, cotangents))
    return jax.jit(program(case))(floating, others, cotangents)


def _relative_error(out, expected) -> float:
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(out - expected) / (scale if scale else 1.0))


# Measurement


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


def measure_time(case: Case) -> dict:
    """The row of an operator: checked, then timed between two matmuls."""
    row = case.work()
    if case.implementation != "reference":
        found, tolerance = errors(case), TOLERANCE[case.dtype]
        # JSON has no nan: null stands for what is not finite.
        row["errors"] = {name: error if np.isfinite(error) else None for name, error in found.items()}
        row |= {"tolerance": tolerance, "checked_shape": dataclasses.asdict(_shortened(case.shape))}
        if not all(error <= tolerance for error in found.values()):  # a nan is not below it
            worst = ", ".join(f"{name} {error:.1e}" for name, error in found.items() if not error <= tolerance)
            return row | {"failure": f"not timed, errors above {tolerance:g}: {worst}"}
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


def measure_memory(case: Case) -> dict:
    """The row of a program that is compiled and not run."""
    return case.work() | compile_case(case, jax.eval_shape(lambda: arguments(case)))[1]


# Suites: which cases, how they are measured, and what their table shows


class Suite(NamedTuple):
    cases: Callable[[Case], Iterable[Case]]  # those that an operator, implementation, shape and dtype stand for
    measure: Callable[[Case], dict]
    columns: dict[str, Callable[[dict], str]]  # heading -> text of a row


def _both_passes(case: Case) -> Iterable[Case]:
    return (dataclasses.replace(case, pass_name=name) for name in PASSES)


def _long(case: Case) -> Iterable[Case]:
    yield dataclasses.replace(case, shape=dataclasses.replace(case.shape, T=MEMORY_T), pass_name="forward_backward")


SUITES = {
    "operators": Suite(
        _both_passes,
        measure_time,
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
    ),
    "memory": Suite(
        _long,
        measure_memory,
        {
            "T": lambda row: str(row["sizes"]["T"]),
            "temp MiB": lambda row: f"{row['temp_bytes'] / 2**20:.1f}",
            "arguments MiB": lambda row: f"{row['argument_bytes'] / 2**20:.1f}",
            "outputs MiB": lambda row: f"{row['output_bytes'] / 2**20:.1f}",
            "compile s": lambda row: f"{row['compile_s']:.1f}",
        },
    ),
}


def select(suite: str, operators: list[str], implementations: list[str], shapes: list[str], dtype: str) -> list[Case]:
    """The cases asked for by patterns of names; an empty list stands for all. Raises ValueError for a pattern that fits nothing."""
    named = {o: importlib.import_module(f"pallas_kernels.{o}.shapes").SHAPES for o in _matching("operators", operators, OPERATORS)}
    implementations = _matching("implementations", implementations, {i: None for o in named for i in api(o).IMPLEMENTATIONS})
    shapes = _matching("shapes", shapes, {name: None for o in named for name in named[o]})
    return [
        case
        for operator in named
        for name, shape in named[operator].items()
        if name in shapes
        for implementation in api(operator).IMPLEMENTATIONS
        if implementation in implementations
        for case in SUITES[suite].cases(Case(operator, implementation, name, shape, dtype, "forward"))
    ]


def _matching(flag: str, patterns: list[str], known: Iterable[str]) -> list[str]:
    unknown = [pattern for pattern in patterns if not fnmatch.filter(known, pattern)]
    if unknown:
        raise ValueError(f"--{flag}: nothing is called {', '.join(unknown)}; choose from {', '.join(known)}")
    return [name for name in known if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


# Rows


@functools.cache
def provenance() -> dict:
    """What a row's numbers depend on beside the case: device, versions, revision."""
    device = jax.devices()[0]
    return {
        "device": f"{_cpu_model()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.import_module("jaxlib").__version__,
        "git": _revision(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _revision() -> str | None:
    """The commit of this checkout, with "+dirty" where more than results has changed; None outside of one."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)

    if shutil.which("git") is None or (head := git("rev-parse", "HEAD")).returncode:
        return None
    dirty = git("status", "--porcelain", "--", ":/", ":(top,exclude)experiments/results").stdout
    return head.stdout.strip() + ("+dirty" if dirty else "")


def measure(suite: str, case: Case) -> dict:
    """The whole row of a case; one that raises is a row too, with the message as its failure."""
    row = {"suite": suite, "time": datetime.now(UTC).isoformat(timespec="seconds"), **provenance()}
    row |= {name: getattr(case, name) for name in ("operator", "implementation", "dtype")}
    row |= {"shape": case.shape_name, "sizes": dataclasses.asdict(case.shape), "pass": case.pass_name}
    try:
        return row | SUITES[suite].measure(case)
    except (ValueError, TypeError, RuntimeError) as error:  # refused arguments, failed compilations, no memory left
        return row | {"failure": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}


def table(suite: str, rows: list[dict]) -> Table:
    identity = ("operator", "implementation", "shape", "dtype", "pass")
    table = Table(*identity, *SUITES[suite].columns)
    for row in rows:
        cells = ["failed"] if "failure" in row else [text(row) for text in SUITES[suite].columns.values()]
        table.add_row(*(row[name] for name in identity), *cells)
    return table


def run(cases: list[Case], suite: str, output: Path) -> list[dict]:
    """Measure the cases one after the other, a line printed and a row appended for each."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log has no width to fit
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, output.open("a") as file:
        task = progress.add_task("", total=len(cases))
        for number, case in enumerate(cases, 1):
            progress.update(task, description=str(case))
            row = measure(suite, case)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(task)
            figures = row.get("failure") or ", ".join(f"{name} {text(row)}" for name, text in SUITES[suite].columns.items())
            console.print(f"{number}/{len(cases)} {case}: {figures}", markup=False, highlight=False, soft_wrap=True)
    console.print(table(suite, rows))
    return rows


_SUITE = flags.DEFINE_enum("suite", "operators", sorted(SUITES), "What to measure.")
_OPERATORS = flags.DEFINE_list("operators", [], f"Of {', '.join(OPERATORS)}; all by default.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", [], "Such as reference, xla; all that an operator has by default.")
_SHAPES = flags.DEFINE_list("shapes", [], "Names from the operators' shapes.py, such as *340m; all by default.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(TOLERANCE), "Of the floating-point arguments.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to append to; experiments/results/<platform>.jsonl by default.")


def main(argv) -> int:
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; the flags are in --help")
        cases = select(_SUITE.value, _OPERATORS.value, _IMPLEMENTATIONS.value, _SHAPES.value, _DTYPE.value)
    except ValueError as error:
        sys.exit(f"experiments.bench: {error}")
    output = Path(_OUTPUT.value or Path(__file__).parent / "results" / f"{jax.devices()[0].platform}.jsonl")
    # float32 rows are float32 throughout: TPUs and GPUs would multiply with fewer bits by default.
    with jax.default_matmul_precision("highest" if _DTYPE.value == "float32" else "default"):
        rows = run(cases, _SUITE.value, output)
    failures = [row for row in rows if "failure" in row]
    print(f"{len(rows)} rows, {len(failures)} of them failures, appended to {output}")
    return 1 if failures else 0


if __name__ == "__main__":
    app.run(main)
