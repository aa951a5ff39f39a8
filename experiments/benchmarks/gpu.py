"""On a GPU: every recurrence, attention and short convolutions, at the shapes of the study's models: our kernels and XLA's form beside
flash-linear-attention's Triton.

Rows are of 32k tokens in bfloat16, forward and forward + backward, from sequences of 2,048 tokens to one of 32,768. What is timed is
checked first, fla's operators too. Ours and fla's run in a process each on the same card, started anew where one hangs or fails.
Compilation takes far longer than what is measured, so it is done ahead, by all cores.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from experiments.benchmarks import ahead, correctness, fla_import, fla_peer, gpu_steps
from experiments.benchmarks.batches import batches, summary
from experiments.benchmarks.cases import Case, arguments, at_lengths, both_passes, program, select
from experiments.benchmarks.gpu_static import takes
from experiments.benchmarks.rows import Suite
from experiments.benchmarks.timing import compile_case, matmul_rate
from experiments.compiled.process import SHARED, Here, Process

LENGTHS = (2048, 8192, 32768, 4096, 16384)  # most wanted first: what there is no time for is measured by the next call
XLA_LENGTHS = (2048, 32768)  # of XLA's form, which takes long to compile and is compared with least
SECONDS = 450.0  # after which no further row is begun
CALL_SECONDS = 200.0  # that an answer is waited for
CHECKED_T = 1024
DTYPE = "bfloat16"
UNCHOSEN = {"FLA_CACHE_RESULTS": "0"}  # for fla not to keep which block sizes were fastest, only their kernels


def cases(operators: list[str], shapes: list[str], configs: list[str]) -> list:
    """Operators' cases, then whole steps. Raises ValueError for names that do not exist."""
    one_each = select(operators, ["xla", "pallas"], shapes or ["*340m", "*1b3"], DTYPE)
    peers = [dataclasses.replace(c, implementation="fla") for c in one_each if c.implementation == "xla" and _peer(c)]
    found = [
        case
        for one in [*filter(takes, one_each), *peers]
        for at in at_lengths(one, XLA_LENGTHS if one.implementation == "xla" else LENGTHS)
        for case in both_passes(at)
    ]
    found.sort(key=lambda case: (case.shape.T not in LENGTHS or LENGTHS.index(case.shape.T), case.implementation == "xla", case.shape_name))
    return [*found, *gpu_steps.select(configs or gpu_steps.CONFIGS)]


def wanted_first(case: Case | gpu_steps.Case) -> bool:
    """Whether a case is of 340M and sequences of 2,048 tokens, as the study trained; of steps the Transformer's and the hybrids' at 6:1."""
    if isinstance(case, Case):
        return case.shape.T == LENGTHS[0] and case.implementation != "xla" and not case.shape_name.endswith("1b3")
    return case.window == LENGTHS[0] and case.config.endswith(("transformer:340m", "_r6:340m"))


def _peer(case: Case) -> bool:
    return fla_peer.has(case.operator, dataclasses.asdict(case.shape))


@functools.cache
def rates() -> dict[str, float]:
    """What the card gives: bytes a second of a large copy, read and written, and FLOP/s of a large product of random matrices."""
    y = jax.random.normal(jax.random.key(1), (2**20 if jax.devices()[0].platform == "cpu" else 2**30,), DTYPE)
    copy = jax.jit(lambda y: -y)
    seconds = summary(batches(lambda: copy(y), jax.block_until_ready))["median_s"]
    return {"bytes_per_s": 2 * y.nbytes / seconds, "matmul_flop_per_s": matmul_rate(DTYPE)}


def small(shape):
    """The shape that is checked, long enough for a sequence to be cut into pieces."""
    return dataclasses.replace(shape, B=1, T=min(shape.T, CHECKED_T))


class Runs(NamedTuple):
    """Where programs are run: ours, and fla's. A kernel that hangs, or loses the card's context, takes no more than its process with it."""

    ours: Process | Here
    peer: Process | Here

    def close(self):
        for process in self:
            process.close()


def _ask(process: Process | Here, function: Callable, *arguments):
    """``function(*arguments)`` in a process, of which nothing is kept where that fails."""
    try:
        return process.call(function, *arguments, seconds=CALL_SECONDS)
    except Exception:
        process.close()
        raise


def measure(case: Case, runs: Runs) -> dict:
    """The row of an operator: checked, then timed, with its shares of what the card gives."""
    row = case.work() | {"card": _ask(runs.ours, rates)}
    row |= _measure_peer(case, runs) if case.implementation == "fla" else _ask(runs.ours, _measure_ours, case)
    if "failure" in row:
        return row
    row |= summary(row.pop("seconds"))
    row["bandwidth_share"] = row["bytes"] / row["median_s"] / row["card"]["bytes_per_s"]
    row["matmul_share"] = row["flops"] / row["median_s"] / row["card"]["matmul_flop_per_s"]
    return row


def rehearse(cases: list[Case]) -> None:
    """Compile all that :func:`measure` runs for these: ours without running it, fla's by running each of Triton's choices once."""
    for case in cases:
        if case.implementation == "fla":
            fla_import.choose_nothing()
            _measure_peer(case, Runs(Here(), Here()))
            continue
        correctness.compile_check(case, small)
        for one in (case, *_held_against(case)):
            compile_case(one, arguments(one))


def of_one_shape(cases: list[Case]) -> list[list[Case]]:
    """The cases, those together that have programs in common."""
    found: dict[tuple, list[Case]] = {}
    for case in cases:
        found.setdefault((case.operator, case.implementation, case.shape_name), []).append(case)
    return list(found.values())


def _measure_ours(case: Case) -> dict:
    row = correctness.check(case, small)
    if "failure" in row:
        return row
    values = arguments(case)
    compiled, facts = compile_case(case, values)
    row |= _check_whole(case, compiled, values)
    if "failure" in row:
        return row
    times = batches(lambda: compiled(*values), jax.block_until_ready)
    return row | {"peak_bytes": facts["temp_bytes"] + facts["output_bytes"], "seconds": times} | _by_kernel(compiled, values)


def _by_kernel(compiled, values: tuple[dict, ...]) -> dict:
    """Of a row: the kernels of a call and their milliseconds, in order, by the card's own counters; or why they are not to be had.

    Where their sum is far below the median the host is what is waited for.
    """
    if jax.devices()[0].platform != "gpu":
        return {}
    try:
        return {"kernels": profiler.measure(compiled, aggregate=False)(*values)[1]}
    except Exception as error:  # a luxury: what is to be measured has been
        return {"kernels": f"not to be had: {error}"}


def _check_whole(case: Case, compiled, values: tuple[dict, ...]) -> dict:
    """Of a row: whether it is cuDNN's (attention of one document), and of our kernels, on all that is timed, what two calls differ in,
    and at some lengths how far they are from XLA's form; "failure" where they differ at all, or are too far.
    """
    by_cudnn = "__cudnn" in compiled.as_text()
    row = {"cudnn": by_cudnn}
    if case.implementation != "pallas" or by_cudnn:  # whose gradients are sums in any order
        return row
    outputs = compiled(*values)
    again = compiled(*values)
    differing = {name: float(jnp.mean(a != again[name])) for name, a in outputs.items()}
    del again
    if any(differing.values()):
        told = ", ".join(f"{share:.1e} of {name}" for name, share in differing.items() if share)
        return row | {"failure": f"not measured, two calls differ in {told}: a race, or memory that nobody wrote"}
    for other in _held_against(case):
        expected = compile_case(other, values)[0](*values)
        row["errors_of_whole"] = {name: _off(outputs[name], expected[name]) for name in expected}
        if not all(error <= correctness.TOLERANCE[case.dtype] for error in row["errors_of_whole"].values()):
            worst = max(row["errors_of_whole"], key=row["errors_of_whole"].get)
            row["failure"] = f"not measured, {worst} is {row['errors_of_whole'][worst]:.1e} off XLA's form at the whole shape"
    return row


def _held_against(case: Case) -> list[Case]:
    """XLA's form of one of our kernels, at the lengths that it is measured at too."""
    wanted = case.implementation == "pallas" and case.pass_name == "forward_backward" and case.shape.T in XLA_LENGTHS
    return [dataclasses.replace(case, implementation="xla")] if wanted else []


@jax.jit
def _distance(a, b):
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return jnp.linalg.norm((a - b).ravel()), jnp.linalg.norm(b.ravel())


def _off(a, b) -> float:
    distance, size = map(float, _distance(a, b))
    return distance / (size or 1.0)


def _measure_peer(case: Case, runs: Runs) -> dict:
    """fla's operator, held against our reference; timed first, as the block sizes that fla then finds fastest are kept for any length."""
    reference = dataclasses.replace(case, implementation="reference", shape_name="", shape=small(case.shape), pass_name="forward_backward")
    given = _reference(reference, runs.ours)[0]
    timed = _ask(runs.peer, fla_peer.time_operator, case.operator, dataclasses.asdict(case.shape), given, case.pass_name)
    row = correctness.verdict(_peer_errors(reference, runs), case.dtype, reference.shape)
    return row if "failure" in row else row | timed


@functools.cache
def _peer_errors(reference: Case, runs: Runs) -> dict[str, float]:
    """The relative errors of fla's outputs, and of the gradients of its output: not all of its operators have them of the final state."""
    given, cotangent, expected = _reference(reference, runs.ours)
    found = _ask(runs.peer, fla_peer.outputs, reference.operator, dataclasses.asdict(reference.shape), given, cotangent)
    return {name: correctness.relative_error(a, expected[name]) for name, a in found.items()}


@functools.cache
def _reference(case: Case, ours: Process | Here):
    return _ask(ours, _run_reference, case)


def _run_reference(case: Case) -> tuple[fla_peer.Arrays, fla_peer.Arrays, dict[str, np.ndarray]]:
    """(the operator's arguments, the cotangent of its output, outputs and gradients in float32)."""
    floating, others, cotangents = arguments(case)
    output = {name: a if name == "output" else jnp.zeros_like(a) for name, a in cotangents.items()}
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (floating, output))
    expected = jax.jit(program(case))(exact[0], others, exact[1])
    return _given(floating), _given({"output": cotangents["output"]}), {name: np.asarray(a) for name, a in expected.items()}


def _given(arrays: dict[str, jax.Array]) -> fla_peer.Arrays:
    return {name: (np.asarray(a, np.float32), str(a.dtype)) for name, a in arrays.items()}


@contextlib.contextmanager
def suites() -> Iterator[list[Suite]]:
    """The suites of operators and of steps, a process for torch running meanwhile. To be entered before JAX asks for the card.

    Raises ValueError where there is no GPU.
    """
    os.environ.update(SHARED | ahead.keep_programs())
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"--suite=gpu is measured on a GPU, and this machine has {device.device_kind}; --target=gpu:h200 needs none")
    until = time.monotonic() + SECONDS
    with contextlib.closing(Runs(Process("our process", SHARED), Process("fla's process", SHARED))) as runs:
        yield rounds(runs, until)


def rounds(runs: Runs, until: float) -> list[Suite]:
    """Operators and steps that are wanted first, then the others'. A step may take all of the card's memory: none is held meanwhile."""
    return [
        one
        for wanted in (wanted_first, lambda case: not wanted_first(case))
        for one in (suite(runs, wanted, until), gpu_steps.suite(wanted, until, runs.close))
    ]


def suite(runs: Runs, wanted: Callable[[Case], bool], until: float) -> Suite:
    """The suite of the operators' cases that are ``wanted``, no row of which is begun after ``until``, by ``time.monotonic``."""
    return Suite(
        "gpu",
        lambda case: [case] if isinstance(case, Case) and wanted(case) else [],
        lambda case: measure(case, runs),
        {
            "median ms": lambda row: f"{row['median_s'] * 1e3:.3f}",
            "quartiles": lambda row: " ... ".join(f"{q * 1e3:.3f}" for q in row["quartiles_s"]),
            "of bandwidth": lambda row: f"{row['bandwidth_share']:.0%}",
            "of matmul": lambda row: f"{row['matmul_share']:.0%}",
            "peak MiB": lambda row: "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            "error": lambda row: f"{max(row['errors'].values()):.1e}",
        },
        until=until,
        rehearse=lambda cases: ahead.rehearse(rehearse, of_one_shape(cases), SHARED | UNCHOSEN, until),
    )
