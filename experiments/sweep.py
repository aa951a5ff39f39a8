"""Train many configurations one after the other, evaluate them, and gather what came of them: a table here, a report in the sweep's folder.

    python -m experiments.sweep --size=tiny --config.train.steps=50            # all 31 models of the study
    python -m experiments.sweep --size=tiny --models='gla_*,transformer'       # some of them
    python -m experiments.sweep --size=tiny --models='kda_*'                   # beyond the study
    python -m experiments.sweep --size=tiny --seeds=1,2,3                      # each of them three times
    python -m experiments.sweep --size=tiny --eval='--suite=held_out --lengths=256,1024' --eval='--suite=ruler --lengths=1024'
    python -m experiments.sweep --size=tiny --rows=experiments/results/tiny.jsonl

Every run has its own folder, SWEEP/NAME-SIZE (with --seeds NAME-SIZE-sSEED), and log; what they compile is kept in SWEEP/compiled, for all
of them: seeds of a model compile it once. With each --eval every trained run is evaluated as
`python -m experiments.eval` does with these flags. Once all is done SWEEP/report/report.md has tables and figures, as `python -m
experiments.report --runs='SWEEP/*'` makes them. Ctrl-C and SIGTERM save the run under way and stop. Run the same command again to
continue: what was done is not repeated. Exit code 1 where anything failed or was stopped; the table names it and its log.
"""

import copy
import fnmatch
import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from experiments import cli
from experiments.children import Children
from experiments.configs import recipe
from hybrid_jax.amounts import quantity
from hybrid_jax.config import ConfigError

SIZE = flags.DEFINE_string("size", "tiny", f"Size of the models: {', '.join(recipe.SIZES)}.")
MODELS = flags.DEFINE_list("models", [], "Names, with wildcards, of files in experiments/configs; by default the study's.")
SEEDS = flags.DEFINE_list("seeds", [], "Train each model with each of these seeds; the configuration's own if not given.")
EVAL = flags.DEFINE_multi_string("eval", [], "Flags of `experiments.eval`, a --suite among them: what every run is evaluated by")
FOLDER = flags.DEFINE_string("sweep", "runs/sweep", "Folder of the runs, their logs and the report.")
CONFIG_HELP = "Any field of every run's configuration, as --config.train.steps=100 (docs/configuration.md says what there is)."
ROWS = flags.DEFINE_string("rows", None, "JSON lines file that each run's summary is appended to, once all have ended, if not there yet.")


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


def suites_asked(given: list[str]) -> dict[str, list[str]]:
    """{suite: its other flags, as `experiments.eval` notes them} of every --eval. Raises ConfigError for what is wrong with one."""
    from experiments import beginning, dtype, suites  # here, as their flags are not this command's
    from experiments import eval as evaluation

    asked = {}
    for text in given:
        values = flags.FlagValues()
        for module in (evaluation, suites, beginning, dtype):
            for flag in flags.FLAGS.flags_by_module_dict()[module.__name__]:
                values[flag.name] = copy.deepcopy(flag)
                values[flag.name].unparse()
        try:
            rest = values(["eval", *shlex.split(text)])[1:]
            if rest or values.suite is None or values.suite in asked:
                wrong = f"{rest[0]!r} is no flag" if rest else "every --eval has one --suite of its own"
                raise ConfigError(f"{wrong}, such as --eval='--suite=held_out --lengths=256,1024'")
            asked[values.suite] = suites.asked(values.suite, values)
        except (ValueError, flags.Error) as error:  # of a ConfigError, and of quotes that do not close
            raise ConfigError(f"--eval={text!r}: {error}") from None
    return asked


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


class Outcome(NamedTuple):
    """What came of a job."""

    summary: dict[str, Any] | None  # None where training failed, or was stopped
    evaluated: dict[str, bool]  # by suite: whether it is done

    @property
    def done(self) -> bool:
        return self.summary is not None and all(self.evaluated.values())


def do(job: Job, folder: Path, overrides: list[str], asked: dict[str, list[str]], children: Children, say) -> Outcome:
    """Train one run and evaluate it, each in a process of its own."""
    workdir, log = folder / job.name, folder / f"{job.name}.log"
    say(f"{job.name}, log in {log}")
    if not children.run("train", *job.flags, f"--workdir={workdir}", *overrides, log=log):
        return Outcome(None, dict.fromkeys(asked, False))
    summary, evaluated = json.loads((workdir / "summary.json").read_text()), {}
    for suite, given in asked.items():
        say(f"{job.name}: {suite}, log in {log}")
        evaluated[suite] = is_evaluated(workdir, summary["step"], suite, given) or children.run(
            "eval", f"--workdir={workdir}", f"--suite={suite}", *given, log=log
        )
    return Outcome(summary, evaluated)


def is_evaluated(workdir: Path, step: int, suite: str, given: list[str]) -> bool:
    """Whether `experiments.eval` has measured this before, with these very flags."""
    file = workdir / "evals" / f"{suite}-{step}.json"
    return file.exists() and json.loads(file.read_text()).get("flags") == given


def row(name: str, outcome: Outcome, log: Path) -> list[str]:
    """A line of the table."""
    if outcome.summary is None:
        return [name, "not done", f"see {log}"]
    summary, found = outcome.summary, outcome.summary["evaluation"]
    recall = f"{found['mqar_accuracy']:.1%}" if "mqar_accuracy" in found else "-"
    values = [f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", recall, f"{summary['tokens_per_second']:,.0f}"]
    if outcome.evaluated:
        missing = [suite for suite, done in outcome.evaluated.items() if not done]
        values.append(f"not {', '.join(missing)}: see {log}" if missing else ", ".join(outcome.evaluated))
    return [name, quantity(summary["parameters"]), str(summary["step"]), *values]


def show(outcomes: dict[str, Outcome], folder: Path, with_suites: bool) -> None:
    """Print the table."""
    names = ("run", "size", "steps", "held-out loss", "bits per byte", "recall", "tokens/s", *(["suites"] if with_suites else []))
    columns = (Column(name, overflow="fold", no_wrap=name == "run") for name in names)  # numbers whole in any terminal
    table = Table(*columns, title=f"{SIZE.value}, {folder}")
    for name, outcome in outcomes.items():
        table.add_row(*row(name, outcome, folder / f"{name}.log"))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def report(names: list[str], folder: Path) -> Path:
    """Write that of the runs of these names; its file."""
    from etils import epath

    from experiments.reports import collect, write

    runs = [collect.read(epath.Path(folder / name)) for name in names]
    return write.report(runs, max(run.config.data.window for run in runs), folder / "report")


def append_rows(file: Path, summaries: list[dict[str, Any]]) -> None:
    """Append the summaries that ``file`` does not have yet, a line each: a sweep that is started again finds its own there."""
    known = set(file.read_text().splitlines()) if file.exists() else set()
    lines = [json.dumps(summary) for summary in summaries]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.writelines(f"{line}\n" for line in lines if line not in known)


def main(overrides: list[str]) -> int:
    if "://" in FOLDER.value:
        raise ConfigError(f"--sweep={FOLDER.value}: logs are written there, line by line: give a folder of a file system")
    if SEEDS.value and any(override.lstrip("-").startswith("config.train.seed=") for override in overrides):
        raise ConfigError("--seeds and --config.train.seed are two ways to say one thing: give one of them")
    jobs = [Job(name, SIZE.value, seed) for name in chosen(MODELS.value) for seed in SEEDS.value or [None]]
    folder, asked = Path(FOLDER.value), suites_asked(EVAL.value)
    for job in jobs:  # a mistake in any of them is told before the first one starts
        cli.load_run([*job.flags, *overrides], "")
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    programs = {"JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").absolute())}
    with Children(programs) as children, Progress(*columns, console=Console(highlight=False)) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            outcomes[job.name] = do(job, folder, overrides, asked, children, lambda what: progress.update(task, description=what))
            if children.stopped:
                break
            progress.advance(task)

    show(outcomes, folder, bool(asked))
    if children.stopped:
        print(f"{children.stopped}: stopped at {job.name}, {len(jobs) - len(outcomes)} not begun; the same command again goes on there")
    if children.stopped or not all(outcome.done for outcome in outcomes.values()):
        return 1
    if ROWS.value:
        append_rows(Path(ROWS.value), [outcome.summary for outcome in outcomes.values()])
    print(f"tables and figures: {report(list(outcomes), folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(cli.parse(sys.argv, __doc__, CONFIG_HELP))))
