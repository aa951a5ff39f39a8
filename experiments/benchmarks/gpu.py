"""On a GPU: every recurrence at the shapes of the study's models, our kernels and XLA's form beside flash-linear-attention's Triton.

Rows are of 32k tokens in bfloat16, forward and forward + backward, from sequences of 2,048 tokens to one of 32,768. What is timed is
checked first, fla's operators too. torch and fla run in a process of their own on the same card, which JAX leaves memory to.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import correctness, fla_peer, gpu_steps
from experiments.benchmarks.batches import batches
from experiments.benchmarks.cases import Case, arguments, at_lengths, both_passes, program, select
from experiments.benchmarks.gpu_static import takes
from experiments.benchmarks.process import Process
from experiments.benchmarks.rows import Suite
from experiments.benchmarks.timing import compile_case

OPERATORS = ("linear_scan", "gated_linear_attention", "gated_delta_rule")
LENGTHS = (2048, 8192, 32768, 4096, 16384)  # most wanted first: what there is no time for is measured by the next call
SECONDS = 450.0  # after which no further row is begun
CHECKED_T = 1024
DTYPE = "bfloat16"
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # for JAX to leave memory to others; read when it first asks for the card


def cases(operators: list[str], shapes: list[str], configs: list[str]) -> list:
    """Operators' cases, then whole steps. Raises ValueError for names that do not exist."""
    one_each = select(operators or list(OPERATORS), ["xla", "pallas"], shapes or ["*340m", "*1b3"], DTYPE)
    peers = [dataclasses.replace(c, implementation="fla") for c in one_each if c.implementation == "xla" and _peer(c)]
    found = [case for one in [*filter(takes, one_each), *peers] for at in at_lengths(one, LENGTHS) for case in both_passes(at)]
    found.sort(key=lambda case: (case.shape.T not in LENGTHS or LENGTHS.index(case.shape.T), case.implementation == "xla", case.shape_name))
    return [*found, *gpu_steps.select(configs or gpu_steps.CONFIGS)]


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
    row |= _measure_peer(case, peer) if case.implementation == "fla" else _measure_ours(case)
    if "failure" in row:
        return row
    seconds = row.pop("seconds")
    lower, median, upper = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    row |= {"median_s": median, "quartiles_s": [lower, upper], "batches": len(seconds)}
    row["bandwidth_share"] = row["bytes"] / median / row["card"]["bytes_per_s"]
    row["matmul_share"] = row["flops"] / median / row["card"]["matmul_flop_per_s"]
    return row


def _measure_ours(case: Case) -> dict:
    row = correctness.check(case, small)
    if "failure" in row:
        return row
    values = arguments(case)
    compiled, facts = compile_case(case, values)
    times = batches(lambda: compiled(*values), jax.block_until_ready)
    return row | {"compile_s": facts["compile_s"], "peak_bytes": facts["temp_bytes"] + facts["output_bytes"], "seconds": times}


def _measure_peer(case: Case, peer: Process) -> dict:
    """fla's operator, held against our reference; its gradients are those of the output alone."""
    checked = small(case.shape)
    reference = dataclasses.replace(case, implementation="reference", shape_name="", shape=checked, pass_name="forward_backward")
    floating, others, cotangents = arguments(reference)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (floating, cotangents | {"final_state": 0 * cotangents["final_state"]}))
    expected = jax.jit(program(reference))(exact[0], others, exact[1])
    decay = getattr(case.shape, "decay", None)
    given = {name: (np.asarray(exact[0][name]), str(a.dtype)) for name, a in floating.items()}
    cotangent = {"output": (np.asarray(exact[1]["output"]), str(cotangents["output"].dtype))}
    found = peer.call(fla_peer.outputs, case.operator, decay, given, cotangent)
    row = correctness.verdict({name: correctness.relative_error(a, expected[name]) for name, a in found.items()}, case.dtype, checked)
    if "failure" in row:
        return row
    return row | peer.call(fla_peer.time_operator, case.operator, decay, given, dataclasses.asdict(case.shape), case.pass_name)


@contextlib.contextmanager
def suites() -> Iterator[list[Suite]]:
    """The suites of operators and of steps, a process for torch running meanwhile. To be entered before JAX asks for the card.

    Raises ValueError where there is no GPU.
    """
    os.environ.update(SHARED)
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"--suite=gpu is measured on a GPU, and this machine has {device.device_kind}; --target=gpu:h200 needs none")
    until = time.monotonic() + SECONDS
    with contextlib.closing(Process("fla's process", SHARED)) as peer:
        yield [suite(peer, until), gpu_steps.SUITE._replace(until=until)]


def suite(peer: Process, until: float) -> Suite:
    """The operators' suite, no row of which is begun after ``until``, by ``time.monotonic``."""
    return Suite(
        "gpu",
        lambda case: [case] if isinstance(case, Case) else [],
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
    )
