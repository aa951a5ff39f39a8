"""Mosaic GPU kernels compiled for an H200 that is not there, and what was compiled run on this CPU, with what XLA does between them.

In a process of :func:`environment`: JAX's compiler reads what to write down once.
"""

import contextlib
from collections import Counter
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.compiled import gpu_topology
from pallas_kernels import platforms
from tests.pallas_kernels.ptx import launch, machine, parser

TARGET = "gpu:h200"


def environment(dumps: Path) -> dict[str, str]:
    """That the kernels are compiled in, which are written to ``dumps``. No driver is there to ask whether its version fits."""
    written = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_MLIR_PASSES": "1", "MOSAIC_GPU_DUMP_TO": str(dumps)}
    return gpu_topology.environment() | written | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


class Compiler:
    """change: of the PTX of a kernel, given its name and the PTX, before it is run."""

    written = {}  # (PTX, log) of all kernels that were lowered: none is compiled, and written, again in one process

    def __init__(self, dumps: Path, change):
        self.dumps, self.change = dumps, change
        mesh = jax.sharding.Mesh(np.array(gpu_topology.devices(TARGET)), ("card",))
        self.replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def compile(self, function, name, operands) -> tuple[parser.Program, launch.Launch]:
        """A function that is one kernel."""
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated) for x in operands]
        lowered = jax.jit(function).lower(*shapes)
        key = lowered.as_text()
        if key not in self.written:
            lowered.compile()
            (ptx,) = self.dumps.glob("*.ptx")
            self.written[key] = ptx.read_text(), ptx.with_suffix(".mlir-passes.log").read_text()
            for path in self.dumps.iterdir():
                path.unlink()
        ptx, log = self.written[key]
        return parser.parse(self.change(name, ptx)), launch.read(log)


@contextlib.contextmanager
def kernels(dumps: Path, seed: int = 0, change=lambda name, ptx: ptx):
    """Programs traced meanwhile take the kernels for Hopper, run here. AssertionError where one does what it must not, at the end."""
    compiler, compiled, faults = Compiler(dumps, change), plgpu.kernel, Counter()

    def kernel(body, *, out_type, kernel_name, **keywords):
        def call(*operands):
            program = compiler.compile(compiled(body, out_type=out_type, kernel_name=kernel_name, **keywords), kernel_name, operands)

            def execute(*operands):
                results = [np.frombuffer(b"\xff" * (o.size * o.dtype.itemsize), o.dtype).reshape(o.shape).copy() for o in out_type]
                arrays = [np.array(x) for x in operands] + results
                found = machine.run(
                    *program, [(x.reshape(-1).view(np.uint8), x.dtype.itemsize) for x in arrays], np.random.default_rng(seed)
                )
                faults.update({f"{kernel_name}: {what}": count for what, count in found.items()})
                return tuple(results)

            return tuple(jax.pure_callback(execute, out_type, *operands))

        return call

    jax.clear_caches()
    with mock.patch.object(platforms, "generation", lambda: "hopper"), mock.patch.object(plgpu, "kernel", kernel):
        yield
        jax.effects_barrier()
    jax.clear_caches()
    assert not faults, "\n".join(f"{count} times {what}" for what, count in faults.items())
