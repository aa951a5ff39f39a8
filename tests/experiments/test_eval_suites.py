"""`experiments.eval --suite=...`: every suite on one trained run, what it writes, and what a report makes of it."""

import importlib
import inspect
import json
import re

import pytest
from absl import flags

from experiments import beginning, report, suites
from experiments import eval as evaluation
from tests.experiments.commands import get_config, run, run_eval, run_train


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("suites") / "run"
    assert run_train(workdir, "--config.model.vocabulary=300").code == 0
    return workdir


def written(workdir, suite):
    return json.loads((workdir / "evals" / f"{suite}-8.json").read_text())


def test_held_out_at_several_lengths(workdir):
    result = run_eval(workdir, "--suite=held_out", "--lengths=16,64", "--tokens=512")
    assert result.code == 0, result.err
    found = written(workdir, "held_out")
    assert found["settings"]["tokens"] == 512 and list(found["scores"]) == ["16", "64"]
    assert found["headline"] == {f"loss@{n}": found["scores"][n]["loss"] for n in ("16", "64")}
    assert f"{found['scores']['64']['bits_per_byte']:.4f}" in result.out
    assert (workdir / "evals" / "held_out-8.png").stat().st_size > 10_000


def test_held_out_at_the_training_window_is_the_runs_own_evaluation(workdir):
    assert run_eval(workdir, "--suite=held_out", "--lengths=32", "--tokens=512").code == 0
    own = json.loads((workdir / "eval-8.json").read_text())
    assert own["tokens"] == 512
    assert written(workdir, "held_out")["scores"]["32"]["loss"] == pytest.approx(own["loss"], rel=1e-5)


def test_in_another_dtype_a_runs_own_evaluation_is_told_and_not_written(workdir):
    before = (workdir / "eval-8.json").read_text()
    result = run_eval(workdir, "--dtype=bfloat16", "--tokens=256")
    assert result.code == 0 and "xz -9" in result.out and "written" not in result.out
    assert [file.name for file in workdir.glob("eval-8*")] == ["eval-8.json"] and (workdir / "eval-8.json").read_text() == before


def test_mqar(workdir):
    result = run_eval(workdir, "--suite=mqar", "--examples=8")
    assert result.code == 0, result.err
    found = written(workdir, "mqar")
    # Trained on 2 pairs of 8 in 16 tokens: these, twice and four times that, and those that a length has room for.
    assert list(found["headline"]) == ["2x16", "2x32", "2x64", "4x16", "4x32", "4x64", "8x32", "8x64"]
    assert found["settings"] == {"alphabet": 8, "examples": 8}
    assert re.search(r"8 +│ +│ +\d+\.\d%", result.out)
    assert run_eval(workdir, "--suite=mqar", "--pairs=1", "--lengths=8", "--examples=4", "--dtype=bfloat16").code == 0
    found = written(workdir, "mqar")
    assert list(found["headline"]) == ["1x8"] and found["settings"] == {"alphabet": 8, "examples": 4, "dtype": "bfloat16"}


def test_ruler(workdir):
    result = run_eval(workdir, "--suite=ruler", "--tasks=niah_single_2", "--lengths=800", "--examples=1", "--beginning=260")
    assert result.code == 0, result.err
    found = written(workdir, "ruler")
    assert found["headline"] == {"niah_single_2": 0.0} and found["settings"]["beginning"] == 260
    assert found["notes"] == ["niah_single_2 made of " + found["scores"]["niah_single_2"]["800"]["source"]]
    assert "substitute" in found["notes"][0] and "substitute" in result.out


def test_the_rulers_average_is_over_its_tasks_and_the_lengths():
    groups = {"512": {"MK": 0.5, "mean": 0.1}, "1024": {"MK": 0.7, "mean": 0.2}}
    scores = {"niah_multikey_1": {"512": {"score": 0.0, "source": "essays"}, "1024": {"score": 1.0, "source": "essays"}}}
    results = {"settings": {"lengths": [512, 1024]}, "groups": groups, "scores": scores}
    expected = {"MK": 0.6, "average": 0.15, "niah_multikey_1": 0.5, "average@512": 0.1, "average@1024": 0.2}
    assert suites.SUITES["ruler"].headline(results) == {name: pytest.approx(value) for name, value in expected.items()}
    columns = [list(column.cells) for column in suites.SUITES["ruler"].table("a run", results).columns]
    assert list(zip(*columns, strict=True)) == [
        ("niah_multikey_1", "0.0%", "100.0%", "essays"),
        ("MK", "50.0%", "70.0%", ""),
        ("mean", "10.0%", "20.0%", ""),
    ]


def test_a_task_file_of_the_harness_from_the_command_line(workdir, tmp_path):
    (tmp_path / "colours.jsonl").write_text(
        '{"question": "grass is", "choices": [" green", " blue"], "answer": 0}\n'
        '{"question": "sky is", "choices": [" green", " blue"], "answer": 1}\n'
    )
    (tmp_path / "colours.yaml").write_text(
        f"""task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/colours.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    result = run_eval(workdir, "--suite=lm", "--tasks=colours", f"--include_path={tmp_path}", "--max_length=64")
    assert result.code == 0, result.err
    found = written(workdir, "lm")
    assert found["headline"] == {"colours": found["scores"]["colours"]["acc"]} and found["average"] is None
    assert found["scores"]["colours"]["documents"] == 2 and "acc_norm" in result.out


@pytest.mark.slow  # the harness looks at all its tasks
def test_missing_data_sets_are_told_of(workdir, tmp_path):
    result = run_eval(workdir, "--suite=lm", "--tasks=piqa", f"--data={tmp_path}")
    assert result.code == 2
    assert "baber__piqa" in result.err and len(result.err.splitlines()) == 1


def test_completion(workdir, tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"text": "The name of the device is", "value": "Zeta"}\n' * 2)
    result = run_eval(workdir, "--suite=completion", f"--files={tmp_path}/facts.jsonl", "--max_length=80")
    assert result.code == 0, result.err
    assert written(workdir, "completion")["headline"] == {"facts": 0.0, "average": 0.0} and "0.0%" in result.out


FLAGS = {
    "lm": ["--tasks=a,b", "--examples=3", "--data=d", "--include_path=p", "--num_fewshot=2", "--max_length=99", "--download"],
    "ruler": ["--tasks=a,b", "--lengths=64,32", "--examples=3", "--texts=t"],
    "completion": ["--files=x,y", "--examples=3", "--max_length=99"],
    "mqar": ["--pairs=2,3", "--lengths=64,32", "--examples=3"],
}
PASSED_ON = {
    "lm": {
        **{"tasks": ["a", "b"], "limit": 3, "data": "d", "include_path": "p", "num_fewshot": 2, "max_length": 99, "download": True},
        **{"beginning": 1, "batch": 5},
    },
    "ruler": {"tasks": ["a", "b"], "lengths": [64, 32], "examples": 3, "texts": "t", "beginning": 1, "batch": 5},
    "completion": {"files": ["x", "y"], "limit": 3, "max_length": 99, "beginning": 1, "batch": 5},
    "mqar": {"pairs": [2, 3], "lengths": [64, 32], "examples": 3, "alphabet": 8, "batch": 5},
}


@pytest.mark.parametrize("suite", FLAGS)
def test_every_flag_reaches_its_suite(monkeypatch, suite):
    module = importlib.import_module("hybrid_jax.evals." + {"lm": "harness", "mqar": "recall"}.get(suite, suite))
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *given, **named: inspect.signature(evaluate).bind(*given, **named).arguments)
    flags.FLAGS(["eval", *FLAGS[suite], "--batch=5", *([] if suite == "mqar" else ["--beginning=1"])])
    try:
        found = suites.SUITES[suite].evaluate("the model", None, get_config())
    finally:
        for of_module in (suites, beginning):  # as `commands.run` does before each
            for flag in flags.FLAGS.flags_by_module_dict()[of_module.__name__]:
                flag.unparse()
    assert found.pop("model") == "the model" and found == PASSED_ON[suite]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite=lm", "--pairs=4"], "--pairs has no meaning for --suite=lm, which takes --tasks, --examples, --data"),
        (
            ["--lengths=64"],
            "--lengths has no meaning for an evaluation without --suite, which takes --tokens, --dtype; it is for --suite=held_out or mqar",
        ),
        (["--suite=mqar", "--pairs=four"], "--pairs=['four']: must be positive integers with commas between them"),
        (["--suite=mqar", "--pairs=9"], "no MQAR problem has 9 pairs in 16 or 32 or 64 tokens of an alphabet of 8"),
        (["--suite=ruler", "--tasks=niah_singel_1"], "did you mean 'niah_single_1'?"),
        (["--suite=everything"], "held_out"),
        (["--suite=held_out", "--source=nowhere"], "nowhere"),
    ],
)
def test_refused(workdir, arguments, message):
    result = run_eval(workdir, *arguments)
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite=completion"], "--suite=completion needs --files"),
        (["--suite=lm"], "--suite=lm needs --data=FOLDER"),
        (["--suite=lm", "--tasks=arc_easy", "--nodownload"], "--suite=lm needs --data=FOLDER"),
    ],
)
def test_what_is_missing_is_told_of_before_anything_is_imported(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(evaluation, "read_config", None)
    result = run_eval(tmp_path, *arguments)
    assert result.code == 2 and message in result.err


def test_a_report_of_suites(workdir, tmp_path):
    assert run_eval(workdir, "--suite=mqar", "--examples=4").code == 0
    result = run(report.main, f"--runs={workdir}", f"--output={tmp_path}/out")
    for name in ("runs", "output"):
        flags.FLAGS[name].unparse()
    assert result.code == 0, result.err
    text = (tmp_path / "out" / "report.md").read_text()
    assert "### MQAR by pairs x length (%)" in text and "| 2x16 |" in text
