"""The report: every number is a run's or the study's, means are over seeds, and what cannot be put together is refused."""

import contextlib
import csv
import dataclasses
import json
import statistics

import pytest
from absl import flags

from experiments import cli, report
from experiments.configs import recipe
from experiments.reports import collect, figures, published, tables
from experiments.reports.collect import Score
from hybrid_jax import costs, figure, mixers
from hybrid_jax.config import MIXERS, ConfigError, DataConfig, to_dict
from tests.experiments.commands import run

RUNS = ("gla_pure", "gla_r6", "hgrn2_pure", "hgrn2_r6", "transformer")


def write_run(folder, name, seed=1, size="1b3", loss=2.0, recall=0.5, step=10, tokens=64, evals=(), settings=(), **changes):
    """A run's folder without its parameters."""
    config = cli.load_run([f"--config=configs/{name}.py:{size}"], "").config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed), **changes)
    workdir = folder / f"{name}-s{seed}"
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    found = {"step": step, "tokens": tokens, "loss": loss, "bits_per_byte": loss / 2, "mqar_accuracy": recall, "loss_by_position": [loss]}
    (workdir / f"eval-{step}.json").write_text(json.dumps(found))
    for suite, scores in dict(evals).items():
        (workdir / "evals").mkdir(exist_ok=True)
        written = {"settings": dict(settings).get(suite, {}), "headline": scores, "notes": [f"{suite} with substitutes"]}
        (workdir / "evals" / f"{suite}-{step}.json").write_text(json.dumps(written))
    return workdir


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(RUNS):
        for seed in (1, 2, 3):
            ruler = {"average": 0.1 * i + 0.01 * seed, "MK": 0.2, "Single": 0.3, "niah_single_1": 0.4}
            write_run(tmp_path / "runs", name, seed, loss=2 + i + 0.1 * seed, evals={"ruler": ruler, "lm": {"average": 0.5, "piqa": 0.6}})
    (tmp_path / "runs" / "notes").mkdir()  # no run
    (tmp_path / "runs" / "gla_pure.log").write_text("")
    return tmp_path


def drawn(monkeypatch):
    """Where a picture's axes end up, low and high of each panel."""
    limits = []

    @contextlib.contextmanager
    def subplots(*arguments, **keywords):
        with figure.subplots(*arguments, **keywords) as (drawn, panels):
            yield drawn, panels
        limits[:] = [axes.get_ylim() for axes in drawn.axes]

    monkeypatch.setattr(figures, "subplots", subplots)
    return limits


@pytest.mark.parametrize("share, least, most", [(0.5, 45, 55), (0.0, -2, 8), (0.999, 92, 102)])
def test_an_axis_of_percents_is_ten_points_high(tmp_path, monkeypatch, share, least, most):
    limits = drawn(monkeypatch)
    models = {("width 64", "gla", ratio): {"mqar": Score((share + i / 1e4,))} for i, ratio in enumerate(("pure", "6:1"))}
    figures.by_ratio(models, "width 64", tmp_path / "picture.png")
    assert limits == [pytest.approx((least, most), abs=0.1)]


def test_panels_with_one_axis_show_what_is_in_each(tmp_path, monkeypatch):
    limits = drawn(monkeypatch)
    models = {("340M", "gla", "pure"): {"ruler/Single": Score((0.95,)), "ruler/QA": Score((0.2,))}}
    figures.ruler_groups(models, "340M", tmp_path / "picture.png")
    assert len(limits) == 2 and all(low < 20 and high > 95 for low, high in limits)


def made(folder, *arguments):
    result = run(report.main, f"--runs={folder}/runs/*", f"--output={folder}/out", *arguments)
    for name in ("runs", "output", "costs_at"):
        flags.FLAGS[name].unparse()
    return result


def test_a_report_of_everything(folder):
    result = made(folder, "--costs_at=32768")
    assert result.code == 0, result.err
    assert "15 runs" in result.out
    text = (folder / "out" / "report.md").read_text()
    assert "15 runs of 5 models. Means over seeds" in text
    tokens = 10 * 256 * 4096 / 1e6  # steps, sequences, window
    assert f"| GLA 6:1 | 1, 2, 3 | 10 | {tokens:,.1f} M |" in text and "KV cache at 32,768 |" in text
    assert "* ruler: ruler with substitutes" in text
    row = next(line for line in text.splitlines() if line.startswith("| 6:1 |") and "study: 43.4" in line)
    assert row == "| 6:1 | 32.0 ± 1.0 (study: 43.4) | 12.0 ± 1.0 (study: 33.0) | 22.0 |"  # HGRN2, GLA, their mean
    for name in ("by_ratio", "ruler_groups", "pareto"):
        assert (folder / "out" / f"{name}_1.3B.png").stat().st_size > 10_000
        assert f"({name}_1.3B.png)" in text
    with (folder / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    cell = next(row for row in rows if (row["family"], row["ratio"], row["measure"]) == ("gla", "6:1", "ruler/average"))
    assert float(cell["mean"]) == pytest.approx(0.12) and float(cell["spread"]) == pytest.approx(0.01)
    assert cell["seeds"] == "3" and float(cell["published"]) == 0.330
    with (folder / "out" / "runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["run"].startswith("gla_r6-") and row["measure"] == "ruler/average"]
    assert [row["seed"] for row in rows] == ["1", "2", "3"]
    assert [float(row["value"]) for row in rows] == pytest.approx([0.11, 0.12, 0.13])


def test_means_and_spreads_are_over_seeds(tmp_path):
    runs = [collect.read(write_run(tmp_path, "gla_r6", seed, loss=loss)) for seed, loss in ((1, 2.0), (2, 2.5), (3, 4.0))]
    ((model, scores),) = collect.over_seeds(runs).items()
    assert model == ("1.3B", "gla", "6:1")
    assert scores["loss"] == Score((2.0, 2.5, 4.0))
    assert scores["loss"].mean == pytest.approx(17 / 6) and scores["loss"].spread == pytest.approx(statistics.stdev([2, 2.5, 4]))
    alone = collect.over_seeds(runs[:1])[model]["loss"]
    assert alone.mean == 2.0 and alone.spread is None


def test_the_newest_evaluated_step_is_read(tmp_path):
    workdir = write_run(tmp_path, "gla_r6", step=10)
    (workdir / "checkpoints" / "20").mkdir()
    assert collect.read(workdir).step == 10
    written = json.loads((workdir / "eval-10.json").read_text())
    (workdir / "eval-20.json").write_text(json.dumps(written | {"step": 20, "loss": 1.25}))
    assert (collect.read(workdir).step, collect.read(workdir).scores["loss"]) == (20, 1.25)
    (workdir / "eval-20.json").unlink()
    (workdir / "eval-10.json").unlink()
    with pytest.raises(ConfigError, match="has no evaluation of any of its checkpoints: evaluate it"):
        collect.read(workdir)


def test_of_a_step_the_evaluation_of_the_most_tokens_is_read(tmp_path):
    workdir = write_run(tmp_path, "gla_r6", step=10, loss=2.0)
    written = json.loads((workdir / "eval-10.json").read_text())
    for tokens, loss in ((32, 3.0), (1024, 4.0), (128, 5.0)):
        (workdir / f"eval-10-{tokens}-tokens.json").write_text(json.dumps(written | {"tokens": tokens, "loss": loss}))
    assert collect.read(workdir).scores["loss"] == 4.0
    (workdir / "eval-100-2048-tokens.json").write_text(json.dumps(written | {"step": 100, "tokens": 2048, "loss": 6.0}))
    assert collect.read(workdir).scores["loss"] == 4.0  # that of another step


def test_one_run_is_no_runs(tmp_path):
    write_run(tmp_path / "runs", "gla_r6")
    assert f"1 run, written to {tmp_path}/out/report.md" in made(tmp_path).out
    assert "1 run of 1 model. Means" in (tmp_path / "out" / "report.md").read_text()


def test_what_models_are_called():
    names = {name: cli.load_run([f"--config=configs/{name}.py:tiny"], "").config.model for name in cli.known_configs()}
    assert collect.ratio(names["gla_r24"]) == "24:1" and collect.ratio(names["gla_pure"]) == "pure"
    assert collect.ratio(names["transformer"]) == "full" and collect.size(names["gla_pure"]) == "width 128"
    assert {collect.ratio(model) for model in names.values()} == set(collect.RATIOS)
    assert collect.ratio(dataclasses.replace(names["gla_r6"], ratio_reading="after", layers=7)) == "6:1 after"
    assert collect.ratio(dataclasses.replace(names["gla_r6"], ratio=None, attention_layers=(1, 3))) == "at 1,3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folders of runs"),
        (["--runs=nowhere/*"], "--runs=nowhere/\\* matches no folder of a run"),
        (["--runs=nowhere/*", "--output=gs://bucket/report"], "--output=gs://bucket/report: give a folder of a file system"),
    ],
)
def test_nothing_to_report(arguments, message):
    result = run(report.main, *arguments)
    for flag in ("runs", "output"):
        flags.FLAGS[flag].unparse()
    assert result.code == 2
    assert message.replace("\\", "") in result.err


def test_runs_that_are_not_of_one_recipe_are_refused(tmp_path):
    one, same = write_run(tmp_path / "a", "gla_r6", 1), write_run(tmp_path / "b", "gla_r6", 1)
    with pytest.raises(ConfigError, match="are both 1.3B gla 6:1 and have the same seed, 1: give --runs of one recipe"):
        collect.over_seeds(map(collect.read, (one, same)))
    base = cli.load_run(["--config=configs/gla_r6.py:1b3"], "").config
    other = write_run(tmp_path / "c", "gla_r6", 2, optimizer=dataclasses.replace(base.optimizer, learning_rate=0.1))
    with pytest.raises(ConfigError, match="and differ in optimizer.learning_rate"):
        collect.over_seeds(map(collect.read, (one, other)))


RULER = {"lengths": [4096], "examples": 500, "batch": 8, "texts": None}


@pytest.mark.parametrize(
    ("changes", "unlike"),
    [
        ({"step": 50}, "(step 400 and 50)"),
        ({"tokens": 128}, "(evaluation: tokens 64 and 128)"),
        ({"settings": {"ruler": RULER | {"lengths": [1024]}}}, "(ruler: lengths [4096] and [1024])"),
        ({"settings": {"ruler": RULER | {"examples": 50, "texts": "t"}}}, "(ruler: examples 500 and 50; ruler: texts None and t)"),
        ({"step": 50, "settings": {"ruler": {"lengths": [4096], "examples": 500}}, "tokens": 32}, "tokens 64 and 32; step 400 and 50)"),
    ],
)
def test_seeds_that_were_not_measured_alike_are_refused(tmp_path, changes, unlike):
    like = {"step": 400, "evals": {"ruler": {"average": 0.5}}, "settings": {"ruler": RULER}}
    one, other = write_run(tmp_path, "gla_r6", 1, **like), write_run(tmp_path, "gla_r6", 2, **like | changes)
    with pytest.raises(ConfigError) as refused:
        collect.over_seeds(map(collect.read, (one, other)))
    assert f"{one} and {other} are both 1.3B gla 6:1 and were not measured alike" in str(refused.value)
    assert unlike in str(refused.value) and "evaluate both of one step with the same flags" in str(refused.value)


def test_seeds_that_were_measured_alike_are_averaged(tmp_path):
    """However many texts were read at once, and whatever suites one of them has beside; two others' are still compared."""
    ruler = {"evals": {"ruler": {"average": 0.5}}, "settings": {"ruler": RULER}}
    runs = [collect.read(write_run(tmp_path, "gla_r6", 1)), collect.read(write_run(tmp_path, "gla_r6", 2, **ruler))]
    third = write_run(tmp_path, "gla_r6", 3, evals={"ruler": {"average": 0.7}}, settings={"ruler": RULER | {"batch": 1}})
    (scores,) = collect.over_seeds([*runs, collect.read(third)]).values()
    assert scores["ruler/average"] == Score((0.5, 0.7)) and len(scores["loss"].values) == 3
    fourth = write_run(tmp_path, "gla_r6", 4, evals={"ruler": {"average": 0.7}}, settings={"ruler": RULER | {"examples": 50}})
    with pytest.raises(ConfigError, match="gla_r6-s2 and .*gla_r6-s4 are .*ruler: examples 500 and 50"):
        collect.over_seeds([*runs, collect.read(fourth)])


def test_models_that_were_not_measured_alike_are_told_beside_their_table(folder):
    """The short RULER of one and the early checkpoint of another, in every table that has them and in no other."""
    alike = "Not measured alike"
    assert made(folder).code == 0 and alike not in (folder / "out" / "report.md").read_text()
    shorter = {"settings": {"ruler": RULER | {"lengths": [1024]}}, "evals": {"ruler": {"average": 0.6, "MK": 0.2}}}
    longer = {"settings": {"ruler": RULER}, "evals": {"ruler": {"average": 0.5, "MK": 0.2}}}
    for name, written in {"gla_r3": shorter, "hgrn2_r3": longer, "delta_net_r3": longer}.items():
        write_run(folder / "short" / "runs", name, **written)
    result = made(folder / "short")
    assert result.code == 0, result.err
    parts = (folder / "short" / "out" / "report.md").read_text().split("\n\n")
    told = "Not measured alike: lengths [4096], but [1024] of GLA 3:1."
    places = [i for i, part in enumerate(parts) if alike in part]
    assert [parts[i] for i in places] == [f"In brackets: the study's Table 5, at 1.3B. {told}", told]
    assert [parts[i - 1] for i in places] == ["### RULER, mean of the thirteen tasks (%)", "### RULER by task and group (%)"]
    assert all(parts[i + 1].startswith("| ") for i in places) and "(study: 33.2)" in parts[places[0] + 1]
    assert parts.index("The pictures, too, put together what the tables above say was not measured alike.") > places[-1]

    write_run(folder / "short" / "runs", "transformer", step=20, tokens=128, data=DataConfig(source="my_store", window=4096))
    assert made(folder / "short").code == 0
    parts = (folder / "short" / "out" / "report.md").read_text().split("\n\n")
    told = (
        "Not measured alike: step 10, but 20 of Transformer; text stdlib, but my_store of Transformer; "
        "tokens 64, but 128 of Transformer."
    )
    assert [parts[i - 1] for i, part in enumerate(parts) if part == told] == [
        *("### Held-out bits per byte", "### Held-out loss, nats a token", "### Associative recall (MQAR), answers right (%)")
    ]


def test_the_studys_numbers_agree_among_themselves():
    """Table 6's averages are the means of its groups (three, one, one, three, two, two and one tasks), but for the Transformer's."""
    sizes = {"MK": 3, "MQ": 1, "MV": 1, "Single": 3, "CWE+FWE": 2, "QA": 2, "VT": 1}
    averages = {("delta_net", "3:1"): 0.426, ("gla", "3:1"): 0.365, ("gated_delta_net", "3:1"): 0.440, ("hgrn2", "6:1"): 0.434}
    for model, average in averages.items():
        scores = published.scores("1.3B")[model]
        assert sum(count * scores[f"ruler/{group}"] for group, count in sizes.items()) / 13 == pytest.approx(average, abs=1e-3)
    for size in ("340M", "1.3B"):
        for (family, ratio), scores in published.scores(size).items():
            tasks = [value for name, value in scores.items() if name.startswith("lm/") and name != "lm/average"]
            if tasks:
                assert len(tasks) == 6 and statistics.fmean(tasks) == pytest.approx(scores["lm/average"], abs=1.1e-3), (size, family, ratio)
    assert not published.scores("width 128")


def test_every_mixer_has_its_place():
    assert MIXERS.keys() == recipe.MIXERS.keys() == tables.FAMILIES.keys() == figures.COLORS.keys()
    assert set(MIXERS.values()) == mixers.MIXERS.keys() and set(recipe.FAMILIES) == MIXERS.keys() - {"attention"}


def test_costs_are_the_models_own():
    hybrid, transformer = (cli.load_run([f"--config=configs/{name}.py:1b3"], "").config.model for name in ("gla_r6", "transformer"))
    at = {context: (collect.costs_of(hybrid, context), collect.costs_of(transformer, context)) for context in (4096, 8192)}
    assert at[8192][1]["bytes"] == 2 * at[4096][1]["bytes"]
    grown = [at[8192][i]["bytes"] - at[4096][i]["bytes"] for i in (0, 1)]
    assert grown[1] == 6 * grown[0]  # every sixth layer keeps keys and values
    assert at[4096][0]["bytes"] - grown[0] == costs.state_bytes(hybrid) > 0  # the others a state, of one size
    assert [at[4096][i]["flops"] for i in (0, 1)] == [costs.flops_per_token(model, 4096) for model in (hybrid, transformer)]


def test_every_model_is_listed_with_its_own_costs(tmp_path):
    runs = [collect.read(write_run(tmp_path, name, seed)) for name in ("gla_r6", "hgrn2_pure") for seed in (2, 1)]
    of_each = {("1.3B", "gla", "6:1"): {"flops": 1.5e9, "bytes": 4321}, ("1.3B", "hgrn2", "pure"): {"flops": 2.5e9, "bytes": 1234}}
    tokens = f"{10 * 256 * 4096 / 1e6:,.1f} M"
    assert tables.of_models(runs, of_each, "1.3B", 4096).splitlines()[2:] == [
        f"| HGRN2 pure | 1, 2 | 10 | {tokens} | 2.5e+09 | 1,234 |",
        f"| GLA 6:1 | 1, 2 | 10 | {tokens} | 1.5e+09 | 4,321 |",
    ]


def test_the_front_is_what_nothing_cheaper_beats():
    points = {"a": (1, 0.1), "b": (2, 0.1), "c": (3, 0.5), "d": (3, 0.4), "e": (9, 0.6)}
    assert figures.frontier(points) == ["a", "c", "e"]


def test_each_cost_has_a_front_of_its_own(tmp_path, monkeypatch):
    """Of two models the one that takes fewer FLOPs holds more bytes."""
    fronts = []
    monkeypatch.setattr(figures, "frontier", lambda points: fronts.append(points) or list(points))
    models = {("1.3B", "gla", "pure"): {"mqar": Score((0.2, 0.4))}, ("1.3B", "gla", "6:1"): {"mqar": Score((0.5,))}}
    prices = {("1.3B", "gla", "pure"): {"flops": 1.0, "bytes": 40.0}, ("1.3B", "gla", "6:1"): {"flops": 2.0, "bytes": 30.0}}
    measure = next(m for m in tables.BY_RATIO if m.name == "mqar")
    figures.pareto(models, prices, "1.3B", measure, 4096, tmp_path / "picture.png")
    scores = {("gla", "pure"): pytest.approx(0.3), ("gla", "6:1"): 0.5}
    assert fronts == [{model: (prices["1.3B", *model][cost], score) for model, score in scores.items()} for cost in ("flops", "bytes")]


def test_a_table_with_a_gap_has_no_mean_there_and_the_studys_means_over_both_sizes_beside_it():
    measure = next(m for m in tables.BY_RATIO if m.name == "lm/average")
    found = {("hgrn2", "pure"): (0.3,), ("gla", "pure"): (0.35, 0.45), ("gla", "6:1"): (0.5,)}
    models = {("1.3B", *model): {"lm/average": Score(values)} for model, values in found.items()}
    assert tables.by_ratio(models, "1.3B", measure).splitlines() == [
        "|  | HGRN2 | GLA | mean |",
        "| --- | --- | --- | --- |",
        "| pure | 30.0 (study: 48.6) | 40.0 ± 7.1 (study: 45.9) | 35.0 |",
        "| 6:1 |  | 50.0 (study: 47.1) |  |",
    ]


def test_a_table_without_hybrids():
    models = {("width 64", "attention", "full"): {"mqar": Score((0.5,))}}
    measure = next(m for m in tables.BY_RATIO if m.name == "mqar")
    assert tables.by_ratio(models, "width 64", measure).splitlines()[-1] == "| Transformer | 50.0 |"
