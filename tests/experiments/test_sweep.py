"""The sweep over configurations; what it starts is tested with `experiments.train` and `experiments.eval`."""

import json

import pytest
from absl import flags

from experiments import sweep
from experiments.sweep import Job
from hybrid_jax.config import ConfigError

SUMMARY = {
    "parameters": 1234,
    "step": 5,
    "tokens_per_second": 6789.0,
    "evaluation": {"loss": 1.5, "bits_per_byte": 2.25, "mqar_accuracy": 0.5},
}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """What was started, [command, folder, flags], and has left what the commands leave; `retnet_r3` fails, and so does the suite "lm"."""
    flags.FLAGS(["sweep", f"--sweep={tmp_path / 'runs'}", f"--rows={tmp_path / 'rows.jsonl'}", "--models=gla_r6,retnet_r3"])
    begun = []

    def run(children, command, *arguments, log):
        assert children._environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "runs/compiled")
        given = {name: value for name, _, value in (argument.removeprefix("--").partition("=") for argument in arguments)}
        workdir = sweep.Path(given.pop("workdir"))
        begun.append((command, workdir.name, dict(given)))
        if "retnet_r3" in workdir.name or given.get("suite") == "lm":
            return False
        if command == "train":
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "summary.json").write_text(json.dumps(SUMMARY))
        else:
            (workdir / "evals").mkdir(exist_ok=True)
            suite, asked = given.pop("suite"), [f"--{name}={value}" for name, value in given.items()]
            (workdir / "evals" / f"{suite}-5.json").write_text(json.dumps({"flags": asked}))
        return True

    monkeypatch.setattr(sweep.Children, "run", run)
    monkeypatch.setattr(sweep, "report", lambda names, folder: f"a report of {', '.join(names)}")
    yield begun
    flags.FLAGS.unparse_flags()
    for name in ("sweep", "rows", "models", "seeds", "eval"):
        flags.FLAGS[name].unparse()


def test_wildcards_choose_models_in_order():
    assert sweep.chosen(["hgrn_r*", "transformer"]) == ["hgrn_r12", "hgrn_r24", "hgrn_r3", "hgrn_r6", "transformer"]
    assert len(sweep.chosen(["*"])) == 36
    with pytest.raises(ConfigError, match="--models=mamba. matches none of delta_net_pure"):
        sweep.chosen(["gla_r6", "mamba*"])


def test_by_default_the_models_are_the_studys():
    study = ["hgrn", "hgrn2", "retnet", "gla", "delta_net", "gated_delta_net"]
    names = [f"{family}_{ratio}" for family in study for ratio in ("pure", "r24", "r12", "r6", "r3")]
    assert sweep.chosen(sweep.MODELS.default) == sorted([*names, "transformer"])


def test_a_failed_run_is_named_and_the_others_are_kept(started, capsys, tmp_path):
    assert sweep.main(["--config.train.steps=5"]) == 1
    assert started == [
        ("train", f"{name}-tiny", {"config": f"configs/{name}.py:tiny", "config.train.steps": "5"}) for name in ("gla_r6", "retnet_r3")
    ]
    printed = capsys.readouterr().out
    assert "1.23k" in printed and "2.2500" in printed and "50.0%" in printed and "not done" in printed
    assert not (tmp_path / "rows.jsonl").exists() and "a report of" not in printed


def test_a_run_that_is_stopped_is_not_done(started, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.Children, "run", lambda *_, **__: False)
    outcome = sweep.do(Job("gla_r6", "tiny", None), tmp_path, [], {"mqar": []}, sweep.Children(), print)
    assert outcome == (None, {"mqar": False}) and not outcome.done


def test_nothing_is_begun_after_a_signal(started, monkeypatch, capsys):
    def run(children, command, *_, log):
        started.append(command)
        children.stopped = "SIGTERM"
        return False

    monkeypatch.setattr(sweep.Children, "run", run)
    assert sweep.main([]) == 1 and started == ["train"]
    assert "SIGTERM: stopped at gla_r6-tiny, 1 not begun; the same command again goes on there" in capsys.readouterr().out


def test_every_run_is_evaluated_once(started, capsys):
    flags.FLAGS["models"].value = ["gla_r3", "gla_r6"]
    flags.FLAGS["eval"].value = ["--suite=mqar --pairs=2,4", "--examples=9 --suite=ruler --beginning=1"]
    assert sweep.main([]) == 0
    evaluations = [one for one in started if one[0] == "eval"]
    flags_of = {"mqar": {"suite": "mqar", "pairs": "2,4"}, "ruler": {"suite": "ruler", "examples": "9", "beginning": "1"}}
    assert [(folder, given["suite"]) for _, folder, given in evaluations if given == flags_of[given["suite"]]] == [
        (f"gla_{ratio}-tiny", suite) for ratio in ("r3", "r6") for suite in ("mqar", "ruler")
    ]
    printed = capsys.readouterr().out
    assert "mqar, ruler" in printed and "tables and figures: a report of gla_r3-tiny, gla_r6-tiny" in printed

    del started[:]
    assert sweep.main([]) == 0 and [command for command, *_ in started] == ["train", "train"]  # which finds its run finished
    flags.FLAGS["eval"].value = ["--suite=mqar --pairs=2,8"]
    assert sweep.main([]) == 0 and [command for command, *_ in started][2:] == ["train", "eval"] * 2


def test_an_evaluation_that_failed_is_named(started, capsys):
    flags.FLAGS["models"].value, flags.FLAGS["eval"].value = ["gla_r6"], ["--suite=lm --download", "--suite=mqar"]
    assert sweep.main([]) == 1
    assert [given.get("suite") for _, _, given in started] == [None, "lm", "mqar"]
    assert "not lm: see" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "given, said",
    [
        (["--lengths=3"], "every --eval has one --suite of its own"),
        (["--suite=mqar", "--suite=mqar --pairs=2"], "every --eval has one --suite of its own"),
        (["--suite=mqar now"], "'now' is no flag"),
        (["--suite=mqar --lenght=3"], "Did you mean: lengths"),
        (["--suite=mqar '"], "No closing quotation"),
        (["--suite=mqar --texts=essays"], "--texts has no meaning for --suite=mqar"),
        (["--suite=ruler --texts=essays"], "--texts=essays: there is no such file or folder"),
        (["--suite=completion --files=a.jsonl,b.jsonl"], "--files=a.jsonl: there is no such file or folder"),
        (["--suite=mqar --workdir=runs/a"], "Unknown command line flag 'workdir'"),
    ],
)
def test_a_mistake_in_an_evaluation_is_told_before_anything_starts(started, given, said):
    flags.FLAGS["eval"].value = given
    with pytest.raises(ConfigError, match=f"--eval=.*{said}"):
        sweep.main([])
    assert not started


def test_a_bucket_holds_no_sweep(started):
    flags.FLAGS["sweep"].value = "gs://bucket/sweep"
    with pytest.raises(ConfigError, match="--sweep=gs://bucket/sweep.*give a folder of a file system"):
        sweep.main([])


def test_summaries_are_gathered(started, tmp_path):
    flags.FLAGS["models"].value = ["gla_*"]
    assert sweep.main([]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [SUMMARY] * 5


def test_a_summary_is_gathered_once(started, tmp_path, monkeypatch):
    """The same command again adds nothing, and with another seed that seed's row alone; what others wrote stays."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"run": "of another sweep"}\n')
    run = sweep.Children.run

    def with_a_summary_of_its_own(children, command, *arguments, log):
        done = run(children, command, *arguments, log=log)
        (log.with_suffix("") / "summary.json").write_text(json.dumps(SUMMARY | {"run": log.stem}))
        return done

    monkeypatch.setattr(sweep.Children, "run", with_a_summary_of_its_own)
    flags.FLAGS["models"].value, flags.FLAGS["seeds"].value = ["gla_r6"], ["1", "2"]
    assert sweep.main([]) == 0
    first = file.read_text()
    assert [json.loads(line)["run"] for line in first.splitlines()] == ["of another sweep", "gla_r6-tiny-s1", "gla_r6-tiny-s2"]
    assert sweep.main([]) == 0 and file.read_text() == first
    flags.FLAGS["seeds"].value = ["1", "2", "3"]
    assert sweep.main([]) == 0
    added = file.read_text().removeprefix(first)
    assert [json.loads(line)["run"] for line in added.splitlines()] == ["gla_r6-tiny-s3"]


def test_each_seed_is_a_run_of_its_own(started):
    flags.FLAGS["models"].value, flags.FLAGS["seeds"].value = ["gla_r6"], ["3", "4"]
    assert sweep.main([]) == 0
    assert [folder for _, folder, _ in started] == ["gla_r6-tiny-s3", "gla_r6-tiny-s4"]
    assert started[1][2] == {"config": "configs/gla_r6.py:tiny", "config.train.seed": "4"}


def test_one_seed_for_all_seeds_is_refused(started):
    flags.FLAGS["seeds"].value = ["3", "4"]
    with pytest.raises(ConfigError, match="--seeds and --config.train.seed are two ways to say one thing"):
        sweep.main(["--config.train.seed=5"])
    assert not started


def test_a_mistake_is_told_before_anything_starts(started):
    with pytest.raises(ConfigError, match="config.train.steps='many' must be of type int"):
        sweep.main(["--config.train.steps=many"])
    assert not started
