"""Train many configurations one after the other, and gather what came of them in one table.

    python -m experiments.sweep --size=tiny --config.train.steps=50            # all 31 models of the study
    python -m experiments.sweep --size=tiny --models='gla_*,transformer'       # some of them
    python -m experiments.sweep --size=tiny --models='kda_*'                   # beyond the study
    python -m experiments.sweep --size=tiny --seeds=1,2,3                      # each of them three times
    python -m experiments.sweep --size=tiny --rows=experiments/results/tiny.jsonl

Every run has its own folder, SWEEP/NAME-SIZE (with --seeds NAME-SIZE-sSEED), and log; `python -m experiments.report
--runs='SWEEP/*'` makes tables and figures of them. Run the same command again to continue: runs that ended are not
repeated. Exit code 1 where any run failed; the table names it and its log.
"""

import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from experiments import cli
from experiments.configs import recipe
from hybrid_jax.config import ConfigError

SIZE = flags.DEFINE_string("size", "tiny", "Of the models: tiny, recall, 340m or 1b3.")
MODELS = flags.DEFINE_list("models", [], "Names, with wildcards, of files in experiments/configs; by default the study's.")
SEEDS = flags.DEFINE_list("seeds", [], "Train each model with each of these seeds; the configuration's own if not given.")
FOLDER = flags.DEFINE_string("sweep", "runs/sweep", "Folder of the runs.")
ROWS = flags.DEFINE_string("rows", None, "JSON lines file that each run's summary is appended to, once all have ended.")


def chosen(patterns: list[str]) -> list[str]:
    """The configurations that match any of the patterns, in alphabetical order; of none the study's 31.

    Raises ConfigError where a pattern matches none.
    """
    known = cli.known_configs()
    if not patterns:
        return [name for name in known if name.rpartition("_")[0] not in recipe.BEYOND_THE_STUDY]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ConfigError(f"--models={pattern} matches none of {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


class Job(NamedTuple):
    """One run of a sweep."""

    model: str  # a file of experiments/configs
    size: str
    seed: str | None

    @property
    def name(self) -> str:
        """Of its folder and log."""
        return f"{self.model}-{self.size}" + ("" if self.seed is None else f"-s{self.seed}")

    @property
    def flags(self) -> list[str]:
        """What tells it from the others on the command line."""
        return [f"--config=configs/{self.model}.py:{self.size}", *([] if self.seed is None else [f"--config.train.seed={self.seed}"])]


def train(job: Job, folder: Path, overrides: list[str]) -> dict[str, Any] | None:
    """The summary of one run, trained in a process of its own; None where it failed, or was stopped."""
    workdir = folder / job.name
    command = [sys.executable, "-m", "experiments.train", *job.flags, f"--workdir={workdir}", *overrides]
    with (folder / f"{job.name}.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    summary = workdir / "summary.json"
    return json.loads(summary.read_text()) if done.returncode == 0 and summary.exists() else None


def row(name: str, summary: dict[str, Any] | None, log: Path) -> list[str]:
    """A line of the table."""
    if summary is None:
        return [name, "not done", f"see {log}"]
    found = summary["evaluation"]
    recall = f"{found['mqar_accuracy']:.1%}" if "mqar_accuracy" in found else "-"
    values = (f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", recall, f"{summary['tokens_per_second']:,.0f}")
    return [name, f"{summary['parameters']:,}", str(summary["step"]), *values]


def main(overrides: list[str]) -> int:
    if "://" in FOLDER.value:
        raise ConfigError(f"--sweep={FOLDER.value}: logs are written there, line by line: give a folder of a file system")
    if SEEDS.value and any(override.lstrip("-").startswith("config.train.seed=") for override in overrides):
        raise ConfigError("--seeds and --config.train.seed are two ways to say one thing: give one of them")
    jobs = [Job(name, SIZE.value, seed) for name in chosen(MODELS.value) for seed in SEEDS.value or [None]]
    folder = Path(FOLDER.value)
    for job in jobs:  # a mistake in any of them is told before the first one starts
        cli.load_run([*job.flags, *overrides], "")
    folder.mkdir(parents=True, exist_ok=True)
    summaries: dict[str, dict[str, Any] | None] = {}
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(highlight=False)) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=job.name)
            summaries[job.name] = train(job, folder, overrides)
            progress.advance(task)

    names = ("run", "parameters", "steps", "held-out loss", "bits per byte", "recall", "tokens/s")
    table = Table(*(Column(name, overflow="fold") for name in names), title=f"{SIZE.value}, {folder}")  # numbers whole in any terminal
    for name, summary in summaries.items():
        table.add_row(*row(name, summary, folder / f"{name}.log"))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    if ROWS.value and all(summaries.values()):
        with Path(ROWS.value).open("a") as file:
            file.writelines(json.dumps(summary) + "\n" for summary in summaries.values())
    return 0 if all(summaries.values()) else 1


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(cli.parse(sys.argv, __doc__))))
