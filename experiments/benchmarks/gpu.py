"""On a GPU: every recurrence, attention and short convolutions, at the shapes of the study's models: our kernels and XLA's form beside
flash-linear-attention's Triton.

Rows are of 32k tokens in bfloat16, forward and forward + backward, from sequences of 2,048 tokens to one of 32,768. What is timed is
checked first, fla's operators too. torch and fla run in a process of their own on the same card, which JAX leaves memory to. Compilation
takes far longer than what is measured, so it is done ahead, by all cores.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import ahead, correctness, fla_peer, gpu_steps
from experiments.benchmarks.batches import batches, summary
from experiments.benchmarks.cases import Case, arguments, at_lengths, both_passes, program, select
from experiments.benchmarks.gpu_static import takes
from experiments.benchmarks.process import Here, Process
from experiments.benchmarks.rows import Suite
from experiments.benchmarks.timing import compile_case

LENGTHS = (2048, 8192, 32768, 4096, 16384)  # most wanted first: what there is no time for is measured by the next call
XLA_LENGTHS = (2048, 32768)  # of XLA's form, which takes long to compile and is compared with least
SECONDS = 450.0  # after which no further row is begun
CHECKED_T = 1024
DTYPE = "bfloat16"
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # for JAX to leave memory to others; read when it first asks for the card
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
    """Whether a case is of sequences of 2,048 tokens, as the study trained; of steps the 340M Transformer's and the hybrids' at 6:1."""
    if isinstance(case, Case):
        return case.shape.T == LENGTHS[0] and case.implementation != "xla"
    return case.window == LENGTHS[0] and case.config.endswith(("transformer:340m", "_r6:340m"))


def _peer(case: Case) -> bool:
    return fla_peer.has(case.operator, dataclasses.asdict(case.shape))


@functools.cache
def rates() -> dict[str, float]:
    """What the card gives: bytes a second of a large copy, read and written, and FLOP/s of a large product of random matrices."""
    small = jax.devices()[0].platform == "cpu"
    side, size = (512, 2**20) if small else (8192, 2**30)
    x = jax.random.normal(jax.random.key(0), (side, side), DTYPE)
    y = jax.random.normal(jax.random.key(1), (size,), DTYPE)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda y: -y)
    return {
        "bytes_per_s": 2 * y.nbytes / float(np.median(batches(lambda: copy(y), jax.block_until_ready))),
        "matmul_flop_per_s": 2 * side**3 / float(np.median(batches(lambda: product(x, x), jax.block_until_ready))),
    }


def small(shape):
    """The shape that is checked, long enough for a sequence to be cut into pieces."""
    return dataclasses.replace(shape, B=1, T=min(shape.T, CHECKED_T))


def measure(case: Case, peer: Process) -> dict:
    """The row of an operator: checked, then timed, with its shares of what the card gives."""
    row = case.work() | {"card": rates()}
    row |= _measure_one(case, peer)
    if "failure" in row:
        return row
    row |= summary(row.pop("seconds"))
    row["bandwidth_share"] = row["bytes"] / row["median_s"] / row["card"]["bytes_per_s"]
    row["matmul_share"] = row["flops"] / row["median_s"] / row["card"]["matmul_flop_per_s"]
    return row


def _measure_one(case: Case, peer: Process | Here) -> dict:
    return _measure_peer(case, peer) if case.implementation == "fla" else _measure_ours(case)


def rehearse(cases: list[Case]) -> None:
    """All that :func:`measure` does for these, for the sake of what compilers then have on disk."""
    here = Here()
    for case in cases:
        _measure_one(case, here)


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
    times = batches(lambda: compiled(*values), jax.block_until_ready)
    return row | {"peak_bytes": facts["temp_bytes"] + facts["output_bytes"], "seconds": times}


def _measure_peer(case: Case, peer: Process | Here) -> dict:
    """fla's operator, held against our reference."""
    reference = dataclasses.replace(case, implementation="reference", shape_name="", shape=small(case.shape), pass_name="forward_backward")
    row = correctness.verdict(_peer_errors(reference, peer), case.dtype, reference.shape)
    if "failure" in row:
        return row
    given = _given(arguments(reference)[0])
    return row | peer.call(fla_peer.time_operator, case.operator, dataclasses.asdict(case.shape), given, case.pass_name)


@functools.cache
def _peer_errors(reference: Case, peer: Process | Here) -> dict[str, float]:
    """The relative errors of fla's outputs, and of the gradients of its output: not all of its operators have them of the final state."""
    floating, others, cotangents = arguments(reference)
    output = {name: a if name == "output" else jnp.zeros_like(a) for name, a in cotangents.items()}
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (floating, output))
    expected = jax.jit(program(reference))(exact[0], others, exact[1])
    cotangent = _given({"output": cotangents["output"]})
    found = peer.call(fla_peer.outputs, reference.operator, dataclasses.asdict(reference.shape), _given(floating), cotangent)
    return {name: correctness.relative_error(a, expected[name]) for name, a in found.items()}


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
    with contextlib.closing(Process("fla's process", SHARED)) as peer:
        yield rounds(peer, until)


def rounds(peer: Process, until: float) -> list[Suite]:
    """Operators and steps that are wanted first, then the others'."""
    return [
        one
        for wanted in (wanted_first, lambda case: not wanted_first(case))
        for one in (suite(peer, wanted, until), gpu_steps.suite(wanted, until))
    ]


def suite(peer: Process, wanted: Callable[[Case], bool], until: float) -> Suite:
    """The suite of the operators' cases that are ``wanted``, no row of which is begun after ``until``, by ``time.monotonic``."""
    return Suite(
        "gpu",
        lambda case: [case] if isinstance(case, Case) and wanted(case) else [],
        lambda case: measure(case, peer),
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
