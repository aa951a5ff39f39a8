"""The training steps of models, compiled for the chips of a TPU host without a TPU: which kernels, how much memory.

By default the hybrids of each recurrence with full attention at every sixth layer, their state dealt over the chips (fsdp),
a sequence on each.
"""

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Iterator

import jax

from experiments import cli
from experiments.benchmarks.rows import Suite
from experiments.compiled import hlo, tpu_topology
from experiments.compiled.process import Process
from experiments.compiled.targets import TPUS
from experiments.configs import recipe
from hybrid_jax.config import RunConfig
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.advice import implementations_of
from hybrid_jax.train.feed import batch_shapes
from hybrid_jax.train.step import compile_step, make_program

CONFIGS = [f"{name}_r6:{size}" for size in ("340m", "1b3") for name in recipe.FAMILIES]
WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step of ``config`` on sequences of ``window`` tokens, one a device."""

    config: str  # NAME:SIZE, of experiments/configs
    window: int = WINDOW

    def __str__(self):
        return f"step of {self.config}, window {self.window}"

    @property
    def identity(self) -> dict:
        return dataclasses.asdict(self)

    def run_config(self, devices: int) -> RunConfig:
        """The run: as its configuration says, but for the batch and the window."""
        name, _, size = self.config.partition(":")
        config = cli.load_run([f"--config=configs/{name}.py:{size}"], "").config
        data = dataclasses.replace(config.data, window=self.window)
        train = dataclasses.replace(config.train, batch=devices, microbatch=1)
        return dataclasses.replace(config, data=data, train=train)


def select(configs: list[str]) -> list[Case]:
    """A case each. Raises ValueError for a configuration that does not exist."""
    for case in map(Case, configs):
        case.run_config(1)
    return [Case(config) for config in configs]


def compile_for(case: Case, target: str) -> dict:
    """Compile a case for all chips of a target's smallest topology: what its row says of it."""
    devices = tpu_topology.devices(TPUS[target].topology)
    config = case.run_config(len(devices))
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
        "effort": -1 if jax.config.jax_optimization_level == "O0" else 0,  # least (a quarter of the time, a slower program) or a run's
        "compile_s": seconds,
        "held_bytes": held,
        "hbm_bytes": hlo.Module(text).hbm_bytes,
        "implementations": implementations_of(config.model, text),
    }


def implementations(row: dict) -> str:
    """Of a table: operators and what runs them."""
    operators = {operator: names for found in row["implementations"].values() for operator, names in found.items()}
    return ", ".join(f"{operator} {'+'.join(names)}" for operator, names in operators.items())


@contextlib.contextmanager
def suite(target: str) -> Iterator[Suite]:
    """The suite of a target. Raises ConfigError where libtpu is not installed."""
    with contextlib.closing(Process(tpu_topology.COMPILER, tpu_topology.environment(target))) as running:
        yield Suite(
            "tpu_step",
            lambda case: (case,),
            lambda case: running.call(compile_for, case, target),
            {
                "implementations": implementations,
                "a chip holds GB": lambda row: f"{row['held_bytes'] / 1e9:.1f}",
                "HBM GB": lambda row: f"{row['hbm_bytes'] / 1e9:.1f}",
                "compile s": lambda row: f"{row['compile_s']:.0f}",
                "at effort": lambda row: f"{row['effort']:g}",
            },
            about={"target": target, "platform": "tpu"},
        )
