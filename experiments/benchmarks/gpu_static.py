"""What a GPU would do, without a GPU: each program compiled ahead of time for one card, its cost read from what was compiled.

A row holds what XLA's program moves through the card's memory, and of each of our kernels what ptxas and the disassembler say: see
:mod:`.sass`. Of XLA's own kernels only the bytes are known. The times in a row are floors: bytes over the bandwidth and FLOPs over the
rate of the datasheet, instructions over what all schedulers can issue. How far above them a card is, only a card says.

The compiler is that of JAX's CUDA plugin, which reads what to write down once, when it is loaded, so a process of its own compiles.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode  # public from jax 0.11

from experiments.benchmarks import sass
from experiments.benchmarks.cases import Case, arguments, at_lengths, both_passes, program
from experiments.benchmarks.correctness import check
from experiments.benchmarks.rows import Suite
from experiments.compiled import gpu_topology, hlo
from experiments.compiled.process import Process
from experiments.compiled.targets import GPUS, Gpu
from pallas_kernels import platforms

LENGTHS = (2048, 32768)  # that a model's shape is measured at
# Of a multiprocessor of compute capability 9.0.
REGISTERS, SHARED_BYTES, THREADS, CTAS, SCHEDULERS, WARP = 65536, 233472, 2048, 32, 4, 32
RESERVED_BYTES = 1024  # of shared memory, in each block


class Compiler(Process):
    """A process that compiles for one target and writes down every Mosaic GPU kernel."""

    def __init__(self, target: str):
        self.target = target
        self.dumps = Path(tempfile.mkdtemp(prefix="gpu_static_"))
        wanted = {f"MOSAIC_GPU_DUMP_{name}": "1" for name in ("PTXAS", "PTX", "SASS")}
        super().__init__(gpu_topology.COMPILER, gpu_topology.environment() | wanted | {"MOSAIC_GPU_DUMP_TO": str(self.dumps)})

    def written(self, function: Callable, case, *arguments) -> dict:
        """``function(case, target, dumps, *arguments)`` in that process, nothing in dumps before. Raises RuntimeError where it dies."""
        shutil.rmtree(self.dumps, ignore_errors=True)
        self.dumps.mkdir()
        return self.call(function, case, self.target, self.dumps, *arguments)

    def close(self):
        super().close()
        shutil.rmtree(self.dumps, ignore_errors=True)


def compile_cost(case: Case, target: str, dumps: Path, precision: str | None) -> dict:
    """Compile a case for a target and read its cost; the compiler writes to ``dumps``."""
    mesh = jax.sharding.Mesh(np.array(gpu_topology.devices(target)), ("card",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        values = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated),
            jax.eval_shape(lambda: arguments(case)),
        )
        start = time.perf_counter()
        compiled = jax.jit(program(case)).lower(*values).compile()
        seconds = time.perf_counter() - start
    row = {"device": mesh.devices.flat[0].device_kind, "compile_s": seconds, "plugin": importlib.metadata.version("jax-cuda13-plugin")}
    row["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    return row | cost(compiled.as_text(), sass.kernels(dumps))


def cost(text: str, written: list[sass.Kernel]) -> dict:
    """Of a row: the bytes that a compiled module moves, and its kernels, each with how often it is executed and what it moves each time."""
    module = hlo.Module(text)
    unknown, calls, moved = 0, Counter(), Counter()
    for execution in module.executions:
        instruction = module.computations[execution.computation][execution.name]
        unknown += not execution.known
        if "mosaic_gpu" in instruction.attributes:
            name = _name(instruction.attributes, written)
            calls[name] += execution.count
            moved[name] += execution.count * execution.hbm_bytes
    found = []
    for kernel in written:
        same = sum(other.name == kernel.name for other in written)  # such as one for each direction
        of_calls = {"executions": calls[kernel.name] / same, "hbm_bytes": moved[kernel.name] / max(calls[kernel.name], 1)}
        found.append(dataclasses.asdict(kernel) | of_calls | {"ctas_per_sm": ctas_per_sm(kernel)})
    return {
        "hbm_bytes": module.hbm_bytes,
        "unknown_loops": unknown + sum(kernel.unknown_loops for kernel in written),
        "kernels": found,
        "spill_bytes": sum(kernel.spill_bytes for kernel in written),
    }


def _name(attributes: str, written: list[sass.Kernel]) -> str:
    """Which of the kernels an instruction calls: the scope that it was traced in has its name."""
    scopes = re.search(r'op_name="([^"]*)"', attributes)[1].split("/")
    return next((kernel.name for kernel in written if kernel.name in scopes), scopes[-1])


def ctas_per_sm(kernel: sass.Kernel) -> int | None:
    """Blocks of threads that a multiprocessor has room for at once; None where their threads are not known."""
    if kernel.threads is None:
        return None
    warps = math.ceil(kernel.threads / WARP)
    registers = warps * math.ceil(kernel.registers * WARP / 256) * 256  # a warp is given them by the 256
    return min(REGISTERS // registers, SHARED_BYTES // (kernel.smem_bytes + RESERVED_BYTES), THREADS // kernel.threads, CTAS)


def floors(row: dict, target: Gpu, dtype: str) -> dict:
    """Of a row: seconds that it takes at least, by what each of the card's resources does in one, and which of them binds; and ``in_turn``,
    where kernels wait for one another, each by what binds it."""
    issued = stalled = 0.0
    in_turn = row["hbm_bytes"] / target.chip.bytes_per_s
    for kernel in row["kernels"]:
        if kernel["instructions"] is None or not kernel["ctas"]:
            continue
        times = kernel["ctas"] / target.multiprocessors
        issue = times * kernel["instructions"] * kernel["threads"] / WARP / SCHEDULERS
        waves = math.ceil(kernel["ctas"] / (target.multiprocessors * max(kernel["ctas_per_sm"], 1)))
        stalls = waves * kernel["cycles"]
        issued += kernel["executions"] * issue
        stalled += kernel["executions"] * stalls
        in_turn += kernel["executions"] * max(max(issue, stalls) / target.clock_hz - kernel["hbm_bytes"] / target.chip.bytes_per_s, 0)
    seconds = {
        "hbm": row["hbm_bytes"] / target.chip.bytes_per_s,
        "flops": row["flops"] / target.flop_per_s(dtype),
        "issue": issued / target.clock_hz,
        "stalls": stalled / target.clock_hz,
    }
    return {f"{name}_s": value for name, value in seconds.items()} | {"in_turn_s": in_turn, "bound": max(seconds, key=seconds.get)}


def small(shape):
    """A shape of the same kernels that the interpreter has done with in seconds: one row, heads that share one, 128 tokens."""
    least = {"B": 1, "T": 128, "D": 128, "H": 1, "HV": 1, "HK": 1}
    names = [field.name for field in dataclasses.fields(shape)]
    if "HV" in names:
        least["HV"] = max(1, shape.HV // shape.H)
    if "HK" in names:
        least["H"] = shape.H // shape.HK
    return dataclasses.replace(shape, **{name: min(getattr(shape, name), least[name]) for name in names if name in least})


def interpreted_check(case: Case) -> dict:
    """:func:`.check` at a small shape, our kernels in the interpreter; "unchecked" and why where it does not know all that they do."""
    with mock.patch.object(platforms, "generation", return_value="hopper"), force_gpu_interpret_mode(InterpretGPUParams()):
        try:
            return check(case, small)
        except Exception as error:  # whatever an interpreter stumbles over; arguments that the operator refuses fail to compile too
            reset_gpu_interpret_mode_state()
            return {"unchecked": f"the interpreter of jax {jax.__version__}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def measure(case: Case, compiler: Compiler) -> dict:
    """The row of a case: checked here (kernels interpreted), then compiled for the target."""
    row = case.work() | interpreted_check(case)
    if "failure" in row:
        return row
    row |= compiler.written(compile_cost, case, jax.config.jax_default_matmul_precision)
    return row | floors(row, GPUS[compiler.target], case.dtype)


def _kernels(row: dict) -> str:
    """Of each of our kernels the registers, CTAs and how many of these fit a multiprocessor."""
    names = {kernel["name"]: kernel["name"].removeprefix(row["operator"] + "_") for kernel in row["kernels"]}
    parts = (f"{names[k['name']]} {k['registers']}r {k['ctas'] or '?'}:{k['ctas_per_sm'] or '?'}" for k in row["kernels"])
    return ", ".join(parts) or "XLA's"


def takes(case: Case) -> bool:
    """Whether a case can be compiled for a GPU: one of ours only where the operator has a kernel for it."""
    return case.implementation != "pallas" or importlib.util.find_spec(f"pallas_kernels.{case.operator}.gpu") is not None


@contextlib.contextmanager
def suite(target: str) -> Iterator[Suite]:
    """The suite of a target, its compiler running meanwhile. Raises ConfigError where the wheels are not installed."""
    with contextlib.closing(Compiler(target)) as running:
        yield Suite(
            "gpu_static",
            lambda case: [one for at in at_lengths(case, LENGTHS) if takes(at) for one in both_passes(at)],
            lambda case: measure(case, running),
            {
                "kernels": _kernels,
                "spilled bytes": lambda row: str(row["spill_bytes"]),
                "HBM MB": lambda row: f"{row['hbm_bytes'] / 1e6:.1f}{'?' if row['unknown_loops'] else ''}",
                "us HBM": lambda row: f"{row['hbm_s'] * 1e6:.1f}",
                "us FLOPs": lambda row: f"{row['flops_s'] * 1e6:.1f}",
                "us issue": lambda row: f"{row['issue_s'] * 1e6:.1f}",
                "us stalls": lambda row: f"{row['stalls_s'] * 1e6:.1f}",
                "us in turn": lambda row: f"{row['in_turn_s'] * 1e6:.1f}",
                "bound": lambda row: row["bound"],
                "temp MiB": lambda row: f"{row['temp_bytes'] / 2**20:.1f}",
                "compile s": lambda row: f"{row['compile_s']:.1f}",
                "error": lambda row: "unchecked" if "unchecked" in row else f"{max(row['errors'].values()):.1e}",
            },
            about={"target": target, "platform": "gpu"},
        )
