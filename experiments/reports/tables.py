"""The study's tables from any runs, with what the study published beside each number, as Markdown and as CSV."""

import csv
import io
from collections import defaultdict
from dataclasses import dataclass

from experiments.reports import published
from experiments.reports.collect import RATIOS, Run, Score

FAMILIES = {
    "hgrn": "HGRN",
    "hgrn2": "HGRN2",
    "retnet": "RetNet",
    "gla": "GLA",
    "delta_net": "DeltaNet",
    "gated_delta_net": "Gated DeltaNet",
    "kda": "KDA",
    "attention": "Transformer",
}

Model = tuple[str, str, str]  # (size, family, ratio); a family of one's own (docs/extending.md) has its mixer's name for a title
Models = dict[Model, dict[str, Score]]


@dataclass(frozen=True)
class Measure:
    """A number that runs have."""

    name: str  # in Run.scores
    title: str
    percent: bool = False
    table: str | None = None  # of the study, where it has it by ratio

    @property
    def heading(self) -> str:
        """The title, and the unit where it does not name it."""
        return f"{self.title} (%)" if self.percent else self.title


# Those that get a table by ratio, where any run has them.
BY_RATIO = (
    Measure("bits_per_byte", "Held-out bits per byte"),
    Measure("loss", "Held-out loss, nats a token"),
    Measure("mqar", "Associative recall (MQAR), answers right", percent=True),
    Measure("lm/average", "Language modelling, mean accuracy of the six tasks", percent=True, table="Table 4, the mean over both sizes"),
    Measure("ruler/average", "RULER, mean of the thirteen tasks", percent=True, table="Table 5, at 1.3B"),
)


def of_models(runs: list[Run], costs: dict[Model, dict[str, float]], size: str, context: int) -> str:
    """What was trained, how long, and what it costs at ``context`` tokens. Markdown."""
    lines = [["", "seeds", "steps", "tokens", "FLOPs a token, forward", "bytes of state and KV cache"]]
    found = {run.model[1:]: run for run in runs if run.model[0] == size}
    for (family, ratio), run in sorted(found.items(), key=lambda item: _place(*item[0])):
        seeds = sorted(other.config.train.seed for other in runs if other.model == run.model)
        tokens = run.step * run.config.train.batch * run.config.data.window
        cost = costs[run.model]
        numbers = [f"{run.step:,}", f"{tokens / 1e6:,.1f} M", f"{cost['flops']:.4g}", f"{cost['bytes']:,}"]
        lines.append([label(family, ratio), ", ".join(map(str, seeds)), *numbers])
    lines[0][4:] = [f"{title} at {context:,}" for title in lines[0][4:]]
    return markdown(lines)


def by_ratio(models: Models, size: str, measure: Measure) -> str:
    """Ratios down, families across, a mean over the families at the right, as the study's Tables 4 and 5. Markdown."""
    known = published.scores("both" if measure.table and "both" in measure.table else size)
    found = {key[1:]: scores[measure.name] for key, scores in models.items() if key[0] == size and measure.name in scores}
    families = sorted({family for family, _ in found} - {"attention"}, key=place)
    ratios = sorted({ratio for _, ratio in found}, key=_order)
    lines = [["", *(title(family) for family in families), "mean"]]
    for ratio in ratios:
        if ratio == "full":
            continue
        row = [found.get((family, ratio)) for family in families]
        cells = [_cell(score, measure, known.get((family, ratio), {})) for family, score in zip(families, row, strict=True)]
        lines.append([ratio, *cells, _number(sum(s.mean for s in row) / len(row), measure) if all(row) else ""])
    if score := found.get(("attention", "full")):
        cell = _cell(score, measure, known.get(("attention", "full"), {}))
        lines.append(["Transformer", *([""] * len(families)), cell] if families else ["Transformer", cell])
    return markdown(lines)


def by_task(models: Models, size: str, suite: Measure) -> str:
    """Models down, tasks across, as the study's Tables 2, 3 and 6, of all that ``suite.name`` holds. Markdown, "" where no run has it."""
    prefix = f"{suite.name}/"
    found = {key[1:]: scores for key, scores in models.items() if key[0] == size and any(name.startswith(prefix) for name in scores)}
    names = dict.fromkeys(name for scores in found.values() for name in scores if name.startswith(prefix))
    if not found:
        return ""
    known = published.scores(size)
    lines = [["", *(name.removeprefix(prefix) for name in names)]]
    for family, ratio in sorted(found, key=lambda model: _place(*model)):
        cells = [
            _cell(found[family, ratio][name], suite, known.get((family, ratio), {}), name) if name in found[family, ratio] else ""
            for name in names
        ]
        lines.append([label(family, ratio), *cells])
    return markdown(lines)


def unlike(runs: list[Run], suite: str) -> str:
    """In what the models of a table were not measured alike by ``suite``, which all ``runs`` have; "" where in nothing. A sentence."""
    models = {label(*run.model[1:]): run.measured(suite) for run in sorted(runs, key=lambda run: _place(*run.model[1:]))}
    parts = []
    for name in dict.fromkeys(name for measured in models.values() for name in measured):
        with_value = defaultdict(list)
        for model, measured in models.items():
            with_value[str(measured.get(name))].append(model)
        most, *others = sorted(with_value, key=lambda value: -len(with_value[value]))
        if others:
            parts.append(f"{name} {most}, but " + " and ".join(f"{value} of {', '.join(with_value[value])}" for value in others))
    return f"Not measured alike: {'; '.join(parts)}." if parts else ""


def label(family: str, ratio: str) -> str:
    """Such as "GLA 6:1"; the Transformer has no ratio."""
    return title(family) if ratio == "full" else f"{title(family)} {ratio}"


def title(family: str) -> str:
    """Such as "Gated DeltaNet"."""
    return FAMILIES.get(family, family)


def place(family: str) -> tuple:
    """Where it stands among others, to sort by: the study's, one's own by name, the Transformer last."""
    known = list(FAMILIES)
    return family == "attention", known.index(family) if family in known else len(known), family


def to_csv(models: Models, costs: dict[Model, dict[str, float]]) -> str:
    """A line for each model and measure: mean, spread, seeds, what the study published, FLOPs and bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["mean", "spread", "seeds", "published", "flops_per_token", "state_and_cache_bytes"]
    writer.writerow(["size", "family", "ratio", "measure", *columns])
    for (size, family, ratio), scores in models.items():
        known = published.scores(size).get((family, ratio), {})
        cost = costs[size, family, ratio]
        for name, score in scores.items():
            numbers = [score.mean, score.spread, len(score.values), known.get(name), cost["flops"], cost["bytes"]]
            writer.writerow([size, family, ratio, name, *("" if number is None else number for number in numbers)])
    return text.getvalue()


def runs_to_csv(runs: list[Run]) -> str:
    """A line for each run and measure, as they were measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "size", "family", "ratio", "seed", "step", "measure", "value"])
    for run in runs:
        of_run = [run.workdir.resolve().name, *run.model, run.config.train.seed, run.step]
        writer.writerows([*of_run, name, value] for name, value in run.scores.items())
    return text.getvalue()


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def _place(family: str, ratio: str) -> tuple:
    return place(family), _order(ratio)


def _order(ratio: str) -> tuple[int, str]:
    return (RATIOS.index(ratio) if ratio in RATIOS else len(RATIOS), ratio)


def _cell(score: Score | None, measure: Measure, known: dict[str, float], name: str | None = None) -> str:
    """Such as "43.4 ± 0.6 (study: 42.5)"."""
    if score is None:
        return ""
    text = _number(score.mean, measure)
    if score.spread is not None:
        text += f" ± {_number(score.spread, measure)}"
    theirs = known.get(name or measure.name)
    return text if theirs is None else f"{text} (study: {_number(theirs, measure)})"


def _number(value: float, measure: Measure) -> str:
    return f"{100 * value:.1f}" if measure.percent else f"{value:.3f}"
