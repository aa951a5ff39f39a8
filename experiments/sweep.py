"""Train many configurations one after the other, and gather what came of them in one table.

    python -m experiments.sweep --size=tiny --config.train.steps=50            # all 31 models of the study
    python -m experiments.sweep --size=tiny --models='gla_*,transformer'       # some of them
    python -m experiments.sweep --size=tiny --rows=experiments/results/tiny.jsonl

Every run has its own folder, SWEEP/NAME-SIZE, and log; run the same command again to continue: runs that ended are not
repeated. Exit code 1 where any run failed; the table names it and its log.
"""

import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments import cli
from hybrid_jax.config import ConfigError

SIZE = flags.DEFINE_string("size", "tiny", "Of the models: tiny, 340m or 1b3.")
MODELS = flags.DEFINE_list("models", ["*"], "Names, with wildcards, of files in experiments/configs.")
FOLDER = flags.DEFINE_string("sweep", "runs/sweep", "Folder of the runs.")
ROWS = flags.DEFINE_string("rows", None, "JSON lines file that each run's summary is appended to, once all have ended.")


def chosen(patterns: list[str]) -> list[str]:
    """The configurations that match any of the patterns, in alphabetical order. Raises ConfigError where one matches none."""
    known = cli.known_configs()
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ConfigError(f"--models={pattern} matches none of {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def train(name: str, size: str, folder: Path, overrides: list[str]) -> dict[str, Any] | None:
    """The summary of one run, trained in a process of its own; None where it failed."""
    workdir = folder / f"{name}-{size}"
    command = [sys.executable, "-m", "experiments.train", f"--config=configs/{name}.py:{size}", f"--workdir={workdir}", *overrides]
    with (folder / f"{name}-{size}.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    return json.loads((workdir / "summary.json").read_text()) if done.returncode == 0 else None


def row(name: str, summary: dict[str, Any] | None, log: Path) -> list[str]:
    """A line of the table."""
    if summary is None:
        return [name, "failed", f"see {log}"]
    found = summary["evaluation"]
    recall = f"{found['mqar_accuracy']:.1%}" if "mqar_accuracy" in found else "-"
    values = (f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", recall, f"{summary['tokens_per_second']:,.0f}")
    return [name, f"{summary['parameters']:,}", str(summary["step"]), *values]


def main(overrides: list[str]) -> int:
    names, size, folder = chosen(MODELS.value), SIZE.value, Path(FOLDER.value)
    for name in names:  # a mistake in any of them is told before the first one starts
        cli.load_run([f"--config=configs/{name}.py:{size}", *overrides], "")
    folder.mkdir(parents=True, exist_ok=True)
    summaries: dict[str, dict[str, Any] | None] = {}
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(highlight=False)) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=f"{name}:{size}")
            summaries[name] = train(name, size, folder, overrides)
            progress.advance(task)

    table = Table("model", "parameters", "steps", "held-out loss", "bits per byte", "recall", "tokens/s", title=f"{size}, {folder}")
    for name, summary in summaries.items():
        table.add_row(*row(name, summary, folder / f"{name}-{size}.log"))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    if ROWS.value and all(summaries.values()):
        with Path(ROWS.value).open("a") as file:
            file.writelines(json.dumps(summary) + "\n" for summary in summaries.values())
    return 0 if all(summaries.values()) else 1


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(cli.parse(sys.argv, __doc__))))
