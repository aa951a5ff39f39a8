"""What a TPU would do, without a TPU: each program compiled ahead of time for one chip, its cost read from what was compiled.

A row holds the bundles of all that the program executes, the fusions around a kernel included, and the bytes all of it moves
to and from HBM; the time of each, and which binds. Kernels of a loop count once a trip.

libtpu reads its options once, when it is loaded, so a process of its own compiles.
"""

import contextlib
import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from experiments.benchmarks import schedule, tpu_chart
from experiments.benchmarks.cases import Case, arguments, both_passes, program
from experiments.benchmarks.correctness import check
from experiments.benchmarks.rows import Suite
from experiments.compiled import hlo, tpu_topology
from experiments.compiled.process import Process
from experiments.compiled.targets import TPUS


class Compiler(Process):
    """A process that compiles for one target and writes down the schedule of every kernel: minutes and gigabytes for a whole model."""

    def __init__(self, target: str):
        environment = tpu_topology.environment(target)
        self.target = target
        self.dumps = Path(tempfile.mkdtemp(prefix="tpu_static_"))
        options = f"--xla_jf_dump_to={self.dumps} --xla_jf_dump_llo_text=true"
        super().__init__(tpu_topology.COMPILER, environment | {"LIBTPU_INIT_ARGS": options})

    def cost(self, case: Case) -> dict:
        """:func:`compile_cost` in that process. Raises RuntimeError where it dies."""
        shutil.rmtree(self.dumps, ignore_errors=True)
        self.dumps.mkdir()
        return self.call(compile_cost, case, self.target, self.dumps, jax.config.jax_default_matmul_precision)

    def close(self):
        super().close()
        shutil.rmtree(self.dumps, ignore_errors=True)


def chip(target: str) -> jax.sharding.Mesh:
    """A mesh of one device of a target."""
    return jax.sharding.Mesh(np.array(tpu_topology.devices(TPUS[target].topology)[:1]), ("chip",))


def compile_cost(case: Case, target: str, dumps: Path, precision: str | None) -> dict:
    """Compile a case for a target and read its cost; libtpu writes to ``dumps``."""
    mesh = chip(target)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        run, values = as_projected(program(case), jax.eval_shape(lambda: arguments(case)))
        values = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), values)
        start = time.perf_counter()
        compiled = jax.jit(run).lower(*values).compile()
        seconds = time.perf_counter() - start
    device = mesh.devices.flat[0]
    row = {"device": device.device_kind, "cores": device.num_cores, "compile_s": seconds}
    row["libtpu"] = importlib.metadata.version("libtpu")
    row["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    return row | cost(compiled.as_text(), dumps)


def as_projected(run: Callable[..., dict], arguments: tuple[dict, ...]) -> tuple[Callable[..., dict], tuple[dict, ...]]:
    """``run`` on arrays as the projections of a model give and take them, and those: [B,T,H K] for each [B,T,H,K].

    XLA lays out [B,T,H,K] in HBM with the heads of a token in a tile, which no projection does.
    """

    def merged(values):
        shapes = {name: (*a.shape[:2], -1) if a.ndim == 4 and "state" not in name else a.shape for name, a in values.items()}
        return {name: a.reshape(shapes[name]) for name, a in values.items()}

    def projected(*flat):
        split = [{name: a.reshape(given[name].shape) for name, a in one.items()} for one, given in zip(flat, arguments, strict=True)]
        return merged(run(*split))

    return projected, tuple(jax.eval_shape(merged, values) for values in arguments)


def cost(text: str, dumps: Path) -> dict:
    """Of a row: what a compiled module's kernels add up to, each as often as it is executed."""
    module, written, shared = hlo.Module(text), schedule.kernels(dumps), schedule.same_kernel(dumps)
    total = {"bundles": 0, "bundles_most": 0, "fills": 0, "spills": 0, "hbm_bytes": module.hbm_bytes, "vmem_bytes": 0}
    use, unknown, parts = dict.fromkeys(schedule.UNITS, 0.0), 0, []
    for execution in module.executions:
        kernel = written.get(shared.get(execution.name, execution.name))
        if kernel is None:
            continue  # part of the program that calls the kernels
        total["bundles"] += execution.count * kernel.bundles
        total["bundles_most"] += execution.count * kernel.most
        total["fills"] += execution.count * kernel.fills
        total["spills"] += execution.count * kernel.spills
        total["vmem_bytes"] = max(total["vmem_bytes"], kernel.vmem_bytes)
        unknown += kernel.unknown_loops + (not execution.known)
        for unit, used in kernel.use.items():
            use[unit] += execution.count * used
        facts = {"name": execution.name, "executions": execution.count, "bundles": execution.count * kernel.bundles}
        parts.append(facts | {"bundles_most": execution.count * kernel.most, "vmem_bytes": kernel.vmem_bytes})
    total["use"] = {unit: used / max(total["bundles"], 1) for unit, used in use.items()}
    total["unknown_loops"] = unknown
    parts.sort(key=lambda part: part["bundles"], reverse=True)
    total["kernels"] = [part for part in parts if 100 * part["bundles"] > total["bundles"]]
    return total


def measure(case: Case, compiler: Compiler) -> dict:
    """The row of a case: checked on the local device (kernels interpreted), then compiled for the target."""
    row = case.work() | check(case)
    if "failure" in row:
        return row
    row |= compiler.cost(case)
    target = TPUS[compiler.target]
    tokens = case.shape.B * case.shape.T
    row["bundles_per_token_and_head"] = row["bundles"] / tokens / heads(case.shape)
    row["bundle_s"] = row["bundles"] / target.clock_hz
    rate = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[target.version], row["cores"]).mem_bw_bytes_per_second * row["cores"]
    row["hbm_s"] = row["hbm_bytes"] / rate
    row["bound"] = "hbm" if row["hbm_s"] > row["bundle_s"] else "bundles"
    return row


def heads(shape) -> float:
    """Heads of values; for an operator without heads, how often its width holds 128 channels."""
    return getattr(shape, "HV", None) or getattr(shape, "H", None) or shape.D / 128


@contextlib.contextmanager
def suite(target: str) -> Iterator[Suite]:
    """The suite of a target, its compiler running meanwhile. Raises ConfigError where libtpu is not installed."""
    with contextlib.closing(Compiler(target)) as running:
        yield Suite(
            "tpu_static",
            both_passes,
            lambda case: measure(case, running),
            {
                "bundles": lambda row: f"{row['bundles']:,}{'?' if row['unknown_loops'] else ''}",
                "a token and head": lambda row: f"{row['bundles_per_token_and_head']:.2f}",
                "MXU": lambda row: f"{row['use']['MXU']:.0%}",
                "VALU": lambda row: f"{row['use']['VALU']:.0%}",
                "spills": lambda row: str(row["spills"]),
                "VMEM MiB": lambda row: f"{row['vmem_bytes'] / 2**20:.1f}",
                "HBM MB": lambda row: f"{row['hbm_bytes'] / 1e6:.1f}",
                "us bundles": lambda row: f"{row['bundle_s'] * 1e6:.1f}",
                "us HBM": lambda row: f"{row['hbm_s'] * 1e6:.1f}",
                "compile s": lambda row: f"{row['compile_s']:.1f}",
            },
            lambda rows, output: tpu_chart.plot(output, target),
            about={"target": target, "platform": "tpu"},
        )
