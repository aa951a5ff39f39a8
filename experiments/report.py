"""Collect what runs came to into the study's tables and figures, beside the numbers it published.

    python -m experiments.report --runs='runs/sweep/*'                        # writes report/report.md, tables as CSV, pictures
    python -m experiments.report --runs='runs/a/*,runs/b/*' --output=study --costs_at=32768

--runs are folders of training runs (or of converted checkpoints) that were evaluated: by training itself, or by
`python -m experiments.eval` with any of its suites. Runs that differ in nothing but their seed are one model, whose
scores are means, ± their standard deviation; they must have been measured alike. Where models were not, their table says so.
"""

from pathlib import Path

from absl import flags

from experiments import cli
from hybrid_jax.amounts import count
from hybrid_jax.config import ConfigError
from hybrid_jax.storage import run_folder

RUNS = flags.DEFINE_list("runs", None, "Folders of runs, with wildcards, also gs://BUCKET/FOLDER; other folders are passed over.")
OUTPUT = flags.DEFINE_string("output", "report", "Folder to write to.")
COSTS_AT = flags.DEFINE_integer(
    "costs_at", None, "Tokens of context for which the costs are given; by default the training window.", lower_bound=1
)


def main() -> int:
    if not RUNS.value:
        raise ConfigError("give the folders of runs, such as --runs='runs/sweep/*'")
    if "://" in OUTPUT.value:
        raise ConfigError(f"--output={OUTPUT.value}: give a folder of a file system")
    patterns = [run_folder(pattern) for pattern in RUNS.value]
    folders = [found for pattern in patterns for found in sorted(pattern.parent.glob(pattern.name)) if (found / "config.json").exists()]
    if not folders:
        raise ConfigError(f"--runs={','.join(RUNS.value)} matches no folder of a run (with a config.json)")

    from experiments.reports import collect, write

    runs = [collect.read(found) for found in folders]
    file = write.report(runs, COSTS_AT.value or max(run.config.data.window for run in runs), Path(OUTPUT.value))
    print(f"{count(len(runs), 'run')}, written to {file}")
    return 0


if __name__ == "__main__":
    cli.start_without_config(main)
