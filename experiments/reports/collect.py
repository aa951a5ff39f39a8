"""Runs, as a report sees them: which model of the study each is, what it costs, and what was measured of it."""

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from etils import epath

from hybrid_jax import costs
from hybrid_jax.config import Attention, ConfigError, ModelConfig, RunConfig
from hybrid_jax.storage import files
from hybrid_jax.train.workdir import differences, is_free, read_config, read_evaluations, saved_steps

RATIOS = ("pure", "24:1", "12:1", "6:1", "3:1", "full")  # in order of the share of full attention, as the study's figures have them
SIZES = {(24, 1024): "340M", (24, 2048): "1.3B"}  # by layers and width
OWN = "evaluation"  # the run's own, beside the suites


@dataclass(frozen=True)
class Run:
    """One trained model, at its newest evaluated step."""

    workdir: epath.Path
    config: RunConfig
    step: int
    scores: dict[str, float]  # by measure: "bits_per_byte", "mqar", "lm/arc_easy", "ruler/average", "mqar/8x64", ...
    settings: dict[str, dict[str, Any]]  # {suite, or OWN: what it was measured with}, such as {"ruler": {"lengths": [4096], ...}}
    notes: tuple[str, ...] = ()  # what a reader of its scores must know, such as substitutes for texts

    @property
    def model(self) -> tuple[str, str, str]:
        """(size, family, ratio): what runs of different seeds have in common."""
        return size(self.config.model), self.config.model.mixer.name, ratio(self.config.model)

    def measured(self, suite: str) -> dict[str, Any]:
        """All that its scores of ``suite`` depend on beside the model, by name."""
        return {"step": self.step} | self.settings[suite]


@dataclass(frozen=True)
class Score:
    """A measure over the seeds of one model."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The sample standard deviation; None of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def size(model: ModelConfig) -> str:
    """What the study calls it, or the width."""
    return SIZES.get((model.layers, model.width), f"width {model.width}")


def ratio(model: ModelConfig) -> str:
    """ "pure", "6:1" (every 6th layer is full attention), "full", or the list of such layers where it is none of these."""
    if isinstance(model.mixer, Attention):
        return "full"
    if model.attention_layers:
        return "at " + ",".join(map(str, model.attention_layers))
    if model.ratio is None:
        return "pure"
    return f"{model.ratio}:1" + (" after" if model.ratio_reading == "after" else "")


def read(workdir: epath.Path) -> Run:
    """The run in ``workdir``. Raises ConfigError where there is none, or nothing was measured of it."""
    config = read_config(workdir)
    evaluated = [(step, read_evaluations(workdir, step), suite_files(workdir, step)) for step in saved_steps(workdir)]
    evaluated = [one for one in evaluated if any(one[1:])]
    if not evaluated:
        raise ConfigError(
            f"{workdir} has no evaluation of any of its checkpoints: evaluate it (python -m experiments.eval --workdir={workdir}), "
            "or leave it out of --runs"
        )
    step, own, of_suites = evaluated[-1]
    names = {"loss": "loss", "bits_per_byte": "bits_per_byte", "mqar_accuracy": "mqar"}
    scores, notes = {name: own[step][key] for key, name in names.items() if key in own.get(step, ())}, []
    text = {"text": config.data.source}  # whose held-out part it is
    settings = {OWN: text | {"window": config.data.window, "tokens": own[step]["tokens"]}} if step in own else {}
    for file in of_suites:
        suite = file.name.removesuffix(f"-{step}.json")
        found = json.loads(file.read_text())
        scores |= {f"{suite}/{name}": value for name, value in found["headline"].items()}
        settings[suite] = {name: value for name, value in found.get("settings", {}).items() if name != "batch"}  # which changes no score
        if suite == "held_out":
            settings[suite] |= text
        notes += [f"{suite}: {note}" for note in found.get("notes", ())]
    return Run(workdir, config, step, scores, settings, tuple(notes))


def suite_files(workdir: epath.Path, step: int) -> list[epath.Path]:
    """What `experiments.eval --suite=...` wrote of a step."""
    return files(workdir / "evals", f"*-{step}.json")


def over_seeds(runs: Iterable[Run]) -> dict[tuple[str, str, str], dict[str, Score]]:
    """{(size, family, ratio): {measure: Score}}.

    Raises ConfigError where two runs of one model differ in more than their seed, or were not measured alike.
    """
    models: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in runs:
        models[run.model].append(run)
    return {model: _scores(found) for model, found in models.items()}


def _scores(runs: list[Run]) -> dict[str, Score]:
    for pair in itertools.combinations(runs, 2):  # all pairs, as two may share a suite that the first has not
        _check_same(*pair)
    measures = dict.fromkeys(name for run in runs for name in run.scores)
    return {name: Score(tuple(run.scores[name] for run in runs if name in run.scores)) for name in measures}


def _check_same(one: Run, other: Run) -> None:
    changed = [path for path, *_ in differences(one.config, other.config) if path != "train.seed" and not is_free(path)]
    if changed or one.config.train.seed == other.config.train.seed:
        what = f"differ in {', '.join(changed)}" if changed else f"have the same seed, {one.config.train.seed}"
        raise ConfigError(
            f"{one.workdir} and {other.workdir} are both {' '.join(one.model)} and {what}: give --runs of one recipe, a seed each"
        )
    unlike = [f"step {one.step} and {other.step}"] if one.step != other.step else []
    for suite in one.settings.keys() & other.settings.keys():
        theirs = one.settings[suite], other.settings[suite]
        for name in sorted(theirs[0].keys() | theirs[1].keys()):
            first, second = (settings.get(name) for settings in theirs)
            if first != second:
                unlike.append(f"{suite}: {name} {first} and {second}")
    if unlike:
        raise ConfigError(
            f"{one.workdir} and {other.workdir} are both {' '.join(one.model)} and were not measured alike ({'; '.join(sorted(unlike))}): "
            "evaluate both of one step with the same flags (python -m experiments.eval), or leave one out of --runs"
        )


def costs_of(model: ModelConfig, context: int) -> dict[str, float]:
    """ "flops": of a token's forward pass at ``context`` tokens; "bytes": of state and cache of one sequence of that length."""
    return {"flops": costs.flops_per_token(model, context), "bytes": costs.state_bytes(model) + costs.cache_bytes(model, context)}
