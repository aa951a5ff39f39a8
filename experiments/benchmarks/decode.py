"""Decoding: seconds a token and bytes of cache by length of context, of whole models as a user runs them."""

import dataclasses
import time
from pathlib import Path

import numpy as np

from experiments import cli
from experiments.benchmarks.batches import summary
from experiments.benchmarks.rows import Suite
from hybrid_jax import costs
from hybrid_jax.figure import subplots
from hybrid_jax.generation import Session
from hybrid_jax.model import build
from hybrid_jax.sampling import Sampling

CONFIGS = ["gla_pure:tiny", "gla_r6:tiny", "transformer:tiny"]
WRITTEN = 33  # tokens; the first waits for the compilation of the step, and is not timed


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of texts of ``context`` tokens each, the last of them written by ``config``'s model, with random parameters."""

    config: str  # NAME:SIZE, of experiments/configs
    context: int
    batch: int

    def __str__(self):
        return f"{self.config} context {self.context} batch {self.batch}"

    @property
    def identity(self) -> dict:
        return dataclasses.asdict(self)


def select(configs: list[str], contexts: list[str], batch: int) -> list[Case]:
    """Every model at every context. Raises ValueError for a config that does not exist, or a context that is no number or too short."""
    for context in contexts:
        if not context.isdigit() or int(context) <= WRITTEN:
            raise ValueError(f"--contexts={context}: needs a number of tokens above {WRITTEN}")
    for config in configs:
        _model_config(config)
    return [Case(config, int(context), batch) for config in configs for context in contexts]


def _model_config(config: str):
    name, _, size = config.partition(":")
    return cli.load_run([f"--config=configs/{name}.py:{size}" if size else f"--config=configs/{name}.py"], "").config.model


def measure(case: Case) -> dict:
    """The row: prompts read, then tokens written one by one, each timed from when the one before it was there."""
    model = build(_model_config(case.config))
    prompts = np.random.default_rng(0).integers(0, model.config.vocabulary, (case.batch, case.context - WRITTEN)).tolist()
    session = Session(model, case.batch)
    session.read(prompts, room=WRITTEN)  # compiles
    session = Session(model, case.batch)
    start = time.perf_counter()
    session.read(prompts, room=WRITTEN)
    session.wait()
    reading = time.perf_counter() - start
    times = []
    for number, _ in enumerate(session.write(WRITTEN, Sampling(), stop_tokens=(), texts=False), 1):
        if number % case.batch == 0:
            times.append(time.perf_counter())
    found = summary(np.diff(times[1:]))
    kv_bytes, state_bytes = session.held_bytes()
    return {
        "dtype": model.config.dtype,
        "parameters": costs.parameters(model.config),
        "prefill_tokens_per_s": case.batch * len(prompts[0]) / reading,
        **found,
        "tokens_per_s": case.batch / found["median_s"],
        "kv_bytes": kv_bytes,
        "state_bytes": state_bytes,
    }


SUITE = Suite(
    "decode",
    lambda case: [case],
    measure,
    {
        "ms a token": lambda row: f"{row['median_s'] * 1e3:.3f}",
        "quartiles": lambda row: " ... ".join(f"{q * 1e3:.3f}" for q in row["quartiles_s"]),
        "tokens/s": lambda row: f"{row['tokens_per_s']:.0f}",
        "prefill tokens/s": lambda row: f"{row['prefill_tokens_per_s']:.0f}",
        "KV MiB": lambda row: f"{row['kv_bytes'] / 2**20:.2f}",
        "state MiB": lambda row: f"{row['state_bytes'] / 2**20:.2f}",
    },
    lambda rows, output: plot(rows, output.with_name(f"decode_{output.stem}.png")),
)


def plot(rows: list[dict], file: Path) -> Path:
    """Draw time a token and bytes of cache by context, a line a model; the file."""
    rows = [row for row in rows if "failure" not in row]
    with subplots(file, 1, 2, size=(11, 4)) as (figure, (speed, size)):
        for config in dict.fromkeys(row["config"] for row in rows):
            own = [row for row in rows if row["config"] == config]
            contexts = [row["context"] for row in own]
            (line,) = speed.plot(contexts, [row["median_s"] * 1e3 for row in own], marker="o", label=config)
            low, high = zip(*(row["quartiles_s"] for row in own), strict=True)
            speed.fill_between(contexts, [1e3 * q for q in low], [1e3 * q for q in high], color=line.get_color(), alpha=0.15, lw=0)
            sizes = [(row["kv_bytes"] + row["state_bytes"]) / row["batch"] / 2**20 for row in own]
            size.plot(contexts, sizes, marker="o", color=line.get_color(), label=config)
        for axes in (speed, size):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row["context"] for row in rows}), [f"{c:,}" for c in sorted({row["context"] for row in rows})])
            axes.set_xlabel("tokens of context")
        speed.set(title="Time a token, ms", yscale="log")
        size.set(title="State and KV cache a sequence, MiB", yscale="log")
        speed.legend()
        first = rows[0]
        figure.suptitle(f"batch {first['batch']}, {first['dtype']}, {first['device']}", x=0.01, ha="left", fontsize=9)
    return file
