"""Whole training steps on one GPU, of 32k tokens: ours, and the same model in flash-linear-attention with torch.compile; ours without a
GPU too, compiled.

Measured, each is run in a process of its own that ends with it, as a step of either may take all of the card's memory.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.benchmarks import ahead, fla_peer, gpu_static, sass, steps
from experiments.benchmarks.batches import STEP_SECONDS, batches, summary
from experiments.benchmarks.cases import TOKENS
from experiments.benchmarks.rows import Suite
from experiments.compiled import gpu_topology, hlo
from experiments.compiled.process import SHARED, Process
from experiments.compiled.targets import GPUS
from experiments.configs import recipe
from hybrid_jax.config import RunConfig
from hybrid_jax.hf.options import fla_options
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.advice import implementations_of
from hybrid_jax.train.feed import LocalRows, batch_shapes
from hybrid_jax.train.step import compile_step, make_program
from hybrid_jax.train.throughput import peak_flops, training_flops

CONFIGS = [
    "transformer:340m",
    *(f"{family}_{ratio}:340m" for ratio in ("pure", "r6", "r3") for family in recipe.FAMILIES),
    "transformer:1b3",
    *(f"{family}_r6:1b3" for family in recipe.FAMILIES),
]
WINDOWS = (2048, 8192)
ALL = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}  # of the card, for JAX
REMATS = ("none", "operators", "block")  # the first that fits is taken
CALL_SECONDS = 400.0  # that a step's row is waited for, its compilation included
OVERTIME = 90.0  # seconds after which a row that was begun in time is given up
ROOM = 0.95  # of JAX's share, which a step may take


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step of ``config``, :data:`TOKENS` tokens in sequences of ``window``."""

    implementation: str  # "ours" or "fla"
    config: str  # NAME:SIZE, of experiments/configs
    window: int

    def __str__(self):
        return f"step of {self.config} {self.implementation} window {self.window}"

    @property
    def identity(self) -> dict:
        return dataclasses.asdict(self)

    def run_config(self, remat: str) -> RunConfig:
        config = steps.Case(self.config, self.window).run_config(TOKENS // self.window)
        model = dataclasses.replace(config.model, remat=remat)
        return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, microbatch=config.train.batch))


def select(configs: list[str]) -> list[Case]:
    """A case for each configuration, window and side. Raises ValueError for a configuration that does not exist."""
    found = [Case(side, config, window) for config in configs for window in WINDOWS for side in ("ours", "fla")]
    for case in found:
        case.run_config(REMATS[0])
    return found


def compile_fitting(case: Case, device, limit: float):
    """(configuration, mesh, program, compiled step, bytes that it holds): by the first of REMATS with which these fit ``limit``."""
    for remat in REMATS:
        config = case.run_config(remat)
        mesh = make_mesh(config.mesh, [device])
        with jax.set_mesh(mesh):
            program = make_program(config, mesh)
            compiled, held = compile_step(program, batch_shapes(config, mesh))
        if held < ROOM * limit:
            break
    return config, mesh, program, compiled, held


def compile_here(case: Case):
    """:func:`compile_fitting` for the local card, and the program that makes the state a run begins with."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    config, mesh, program, compiled, held = compile_fitting(case, device, limit)
    with jax.set_mesh(mesh):
        begin = program.init.lower(jax.random.key(0)).compile()
    return config, mesh, begin, compiled, held


def rehearse(case: Case) -> None:
    """What :func:`time_ours` compiles, for the sake of what is then on disk."""
    compile_here(case)


def time_ours(case: Case) -> dict:
    """Of a row: seconds of a step on the local card, with random tokens and parameters as a run begins with."""
    config, mesh, begin, compiled, held = compile_here(case)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocabulary, (config.train.batch, case.window + 1)).astype(np.int32)
    ones = np.ones(tokens[:, 1:].shape, np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones.astype(np.float32), "segment_ids": ones}
    with jax.set_mesh(mesh):
        on_card = LocalRows(mesh, config.train.batch).to_mesh({name: batch[name] for name in batch_shapes(config, mesh)})
        state, first = compiled(begin(jax.random.key(0)), on_card)
        loss = float(first.loss)
        if not np.isfinite(loss):
            raise RuntimeError(f"its first loss is {loss}")

        def step():
            nonlocal state
            state, metrics = compiled(state, on_card)
            return metrics.loss

        times = batches(step, jax.block_until_ready, STEP_SECONDS)
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", held)
    names = implementations_of(config.model, compiled.as_text())
    row = {"seconds": times, "loss": loss, "peak_bytes": held, "remat": config.model.remat, "implementations": names}
    return row | {"cudnn": "__cudnn" in compiled.as_text()}  # full attention's, of one document a row


def measure(case: Case, until: float) -> dict:
    """The row of a step, run in a process that ends with it, or soon after ``until``, by ``time.monotonic``."""
    seconds = min(CALL_SECONDS, max(0.0, until - time.monotonic()) + OVERTIME)
    config = case.run_config(REMATS[0])
    with contextlib.closing(Process(f"the process of {case}", ALL)) as process:
        if case.implementation == "ours":
            row = process.call(time_ours, case, seconds=seconds)
        else:
            asked = fla_options(config.model), config.train.batch, case.window
            row = process.call(fla_peer.time_step, *asked, seconds=seconds)
    row |= {"tokens": TOKENS, "flops": training_flops(config)} | summary(row.pop("seconds"))
    flop_per_s = row["flops"] / row["median_s"]
    return row | {"tokens_per_s": TOKENS / row["median_s"], "flop_per_s": flop_per_s, "mfu": flop_per_s / peak_flops(devices=1)[0]}


def suite(wanted: Callable[[Case], bool], until: float, make_room: Callable[[], None]) -> Suite:
    """The suite of the steps that are ``wanted``, none begun after ``until``, by ``time.monotonic``. ``make_room`` is called first."""

    def compile_ahead(cases: list[Case]) -> None:
        make_room()
        ahead.rehearse(rehearse, [case for case in cases if case.implementation == "ours"], ALL | SHARED, until)

    return Suite(
        "gpu_step",
        lambda case: [case] if isinstance(case, Case) and wanted(case) else [],
        lambda case: measure(case, until),
        {
            "ms a step": lambda row: f"{row['median_s'] * 1e3:.1f}",
            "quartiles": lambda row: " ... ".join(f"{q * 1e3:.1f}" for q in row["quartiles_s"]),
            "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
            "model TFLOP/s": lambda row: f"{row['flop_per_s'] / 1e12:.0f}",
            "MFU": lambda row: f"{row['mfu']:.1%}",
            "peak GB": lambda row: "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
            "loss": lambda row: f"{row['loss']:.2f}",
        },
        until=until,
        rehearse=compile_ahead,
    )


def compile_for(case: Case, target: str, dumps: Path) -> dict:
    """Of a row: what our step holds and moves on a card that is not there, and what became of our kernels in it."""
    device = gpu_topology.devices(target)[0]
    start = time.perf_counter()
    config, _, _, compiled, held = compile_fitting(case, device, GPUS[target].chip.memory_bytes)
    seconds, text = time.perf_counter() - start, compiled.as_text()
    kernels = {kernel.name: {"registers": kernel.registers, "spill_bytes": kernel.spill_bytes} for kernel in sass.kernels(dumps)}
    return {
        "device": device.device_kind,
        "compile_s": seconds,
        "tokens": TOKENS,
        "flops": training_flops(config),
        "held_bytes": held,
        "hbm_bytes": hlo.Module(text).hbm_bytes,
        "remat": config.model.remat,
        "implementations": implementations_of(config.model, text),
        "kernels": kernels,
    }


@contextlib.contextmanager
def static_suite(target: str) -> Iterator[Suite]:
    """The steps of a target, compiled for it. Raises ConfigError where the wheels are not installed."""
    with contextlib.closing(gpu_static.Compiler(target)) as running:
        yield Suite(
            "gpu_step_static",
            lambda case: [Case("ours", case.config, window) for window in WINDOWS],
            lambda case: running.written(compile_for, case),
            {
                "implementations": steps.implementations,
                "holds GB": lambda row: f"{row['held_bytes'] / 1e9:.1f}",
                "HBM GB": lambda row: f"{row['hbm_bytes'] / 1e9:.0f}",
                "remat": lambda row: row["remat"],
                "spilled bytes": lambda row: str(sum(kernel["spill_bytes"] for kernel in row["kernels"].values())),
                "compile s": lambda row: f"{row['compile_s']:.0f}",
            },
            about={"target": target, "platform": "gpu"},
        )
