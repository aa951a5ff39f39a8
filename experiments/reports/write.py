"""A report's folder: report.md with its tables, scores.csv with all means, runs.csv with what they are of, and the pictures."""

from pathlib import Path

from experiments.reports import collect, figures, tables
from experiments.reports.collect import Run
from experiments.reports.tables import Measure
from hybrid_jax.amounts import count

RECALL = ("ruler/average", "mqar")  # the first that runs have is what costs are held against
SUITES = (  # as Measure: those of experiments.eval, a table each
    Measure("lm", "Language modelling by task", percent=True),
    Measure("ruler", "RULER by task and group", percent=True),
    Measure("mqar", "MQAR by pairs x length", percent=True),
    Measure("completion", "Completion of real documents by file", percent=True),
    Measure("held_out", "Held-out loss by window, nats a token"),
)


def report(runs: list[Run], context: int, folder: Path) -> Path:
    """Write the report on ``runs`` into ``folder``, costs at ``context`` tokens; its Markdown file."""
    models = collect.over_seeds(runs)
    costs = {run.model: collect.costs_of(run.config.model, context) for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.csv").write_text(tables.runs_to_csv(runs))
    (folder / "scores.csv").write_text(tables.to_csv(models, costs))
    parts = ["# Report", _about(runs, models)]
    for size in sorted({model[0] for model in models}):
        parts += [f"## {size}", tables.of_models(runs, costs, size, context), *_of_size(runs, models, costs, size, context, folder)]
    if notes := dict.fromkeys(note for run in runs for note in run.notes):
        parts += ["## Notes", "\n".join(f"* {note}" for note in notes)]
    file = folder / "report.md"
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def _about(runs: list[Run], models: tables.Models) -> str:
    return (
        f"{count(len(runs), 'run')} of {count(len(models), 'model')}. "
        "Means over seeds, ± their standard deviation. In brackets what the study published, from one seed."
    )


def _of_size(runs: list[Run], models: tables.Models, costs: dict, size: str, context: int, folder: Path) -> list[str]:
    parts, unlike, stem = [], [], size.replace(" ", "_")
    runs = [run for run in runs if run.model[0] == size]
    measured = {name for model, scores in models.items() if model[0] == size for name in scores}
    for measure in tables.BY_RATIO:
        if measure.name in measured:
            source = f"In brackets: the study's {measure.table}." if measure.table and size in ("340M", "1.3B") else ""
            suite = measure.name.partition("/")[0] if "/" in measure.name else collect.OWN
            unlike.append(tables.unlike([run for run in runs if measure.name in run.scores], suite))
            parts += [f"### {measure.heading}", f"{source} {unlike[-1]}".strip(), tables.by_ratio(models, size, measure)]
    for suite in SUITES:
        if table := tables.by_task(models, size, suite):
            unlike.append(tables.unlike([run for run in runs if suite.name in run.settings], suite.name))
            parts += [f"### {suite.heading}", unlike[-1], table]
    pictures = [
        figures.by_ratio(models, size, folder / f"by_ratio_{stem}.png"),
        figures.ruler_groups(models, size, folder / f"ruler_groups_{stem}.png"),
        *(figures.pareto(models, costs, size, m, context, folder / f"pareto_{stem}.png") for m in _recall(measured)),
    ]
    if any(unlike) and any(pictures):
        parts.append("The pictures, too, put together what the tables above say was not measured alike.")
    parts += [f"![{picture.stem.replace('_', ' ')}]({picture.name})" for picture in pictures if picture]
    return [part for part in parts if part]


def _recall(measured: set[str]) -> list[Measure]:
    known = {measure.name: measure for measure in tables.BY_RATIO}
    return [known[name] for name in RECALL if name in measured][:1]
