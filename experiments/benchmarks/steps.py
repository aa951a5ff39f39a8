"""The training steps of the study's models, compiled for the chips of a TPU host without a TPU: which kernels, how much memory.

A row is a hybrid of one of the six recurrences with full attention at every sixth layer, its state dealt over the chips (fsdp), a
sequence on each.
"""

import contextlib
import dataclasses
import fnmatch
import importlib
import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterator

import jax

from experiments.benchmarks import hlo
from experiments.benchmarks.cases import Case
from experiments.benchmarks.rows import Suite
from experiments.benchmarks.tpu_static import TARGETS, compiler
from hybrid_jax.config import RunConfig, from_dict
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.feed import batch_shapes
from hybrid_jax.train.step import compile_step, make_program
from pallas_kernels.checks import implementations_in

FAMILIES = ("hgrn", "hgrn2", "retnet", "gla", "delta_net", "gated_delta_net")
SIZES = ("340m", "1b3")


@dataclasses.dataclass(frozen=True)
class Step:
    """A configuration of experiments/configs and its size; T tokens a sequence, one sequence a chip."""

    config: str
    size: str
    T: int = 4096


def select(patterns: list[str]) -> list[Case]:
    """Cases by patterns of their names, such as ``gla_r6_340m``; all where there are none. Raises ValueError for one that fits nothing."""
    steps = {f"{family}_r6_{size}": Step(f"{family}_r6", size) for size in SIZES for family in FAMILIES}
    for pattern in patterns:
        if not fnmatch.filter(steps, pattern):
            raise ValueError(f"--shapes: nothing is called {pattern}; choose from {', '.join(steps)}")
    names = [name for name in steps if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    return [Case("training_step", "default", name, steps[name], "bfloat16", "step") for name in names]


def run_config(step: Step, devices: int) -> RunConfig:
    """The run of a step: as in its configuration, but for the batch."""
    config = importlib.import_module(f"experiments.configs.{step.config}").get_config(step.size)
    config.data.window = step.T
    config.train.batch, config.train.microbatch = devices, 1
    return from_dict(RunConfig, config.to_dict())


def compile_for(step: Step, target: str) -> dict:
    """Compile a step for all chips of a target's smallest topology: what its row says of it."""
    devices = TARGETS[target].devices()
    config = run_config(step, len(devices))
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        compiled, held = compile_step(make_program(config, mesh), batch_shapes(config, mesh))
        seconds = time.perf_counter() - start
    text = compiled.as_text()
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "libtpu": importlib.metadata.version("libtpu"),
        "compile_s": seconds,
        "held_bytes": held,
        "hbm_bytes": sum(e.count * e.hbm_bytes for e in hlo.Module(text).executions),
        "implementations": {kind: implementations_in(kind, text) for kind in Counter(config.model.layer_kinds)},
    }


def _implementations(row: dict) -> str:
    operators = {operator: names for found in row["implementations"].values() for operator, names in found.items()}
    return ", ".join(f"{operator} {'+'.join(names)}" for operator, names in operators.items())


@contextlib.contextmanager
def suite(target: str) -> Iterator[Suite]:
    """The suite of a target. Raises NoCompiler where libtpu is not installed."""
    with compiler(target, schedule=False) as running:
        yield Suite(
            "tpu_step",
            lambda case: (case,),
            lambda case: {"target": target, "platform": "tpu"} | running.call(compile_for, case.shape, target),
            {
                "implementations": _implementations,
                "a chip holds GB": lambda row: f"{row['held_bytes'] / 1e9:.1f}",
                "HBM GB": lambda row: f"{row['hbm_bytes'] / 1e9:.1f}",
                "compile s": lambda row: f"{row['compile_s']:.0f}",
            },
        )
