"""The sweep over configurations; what it starts is tested with `experiments.train`."""

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
    """Names whose training was asked for; `retnet_r3` fails."""
    flags.FLAGS(["sweep", f"--sweep={tmp_path / 'runs'}", f"--rows={tmp_path / 'rows.jsonl'}", "--models=gla_r6,retnet_r3"])
    names = []

    def train(job, folder, overrides):
        names.append((job, overrides))
        return None if job.model == "retnet_r3" else SUMMARY

    monkeypatch.setattr(sweep, "train", train)
    yield names
    flags.FLAGS.unparse_flags()
    for name in ("sweep", "rows", "models", "seeds"):
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
    assert started == [(Job(name, "tiny", None), ["--config.train.steps=5"]) for name in ("gla_r6", "retnet_r3")]
    printed = capsys.readouterr().out
    assert "1,234" in printed and "2.2500" in printed and "50.0%" in printed and "not done" in printed
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_run_that_is_stopped_is_not_done(tmp_path, monkeypatch):
    """By SIGTERM: the trainer saves, and exits with 0."""
    monkeypatch.setattr(sweep.subprocess, "run", lambda command, **_: sweep.subprocess.CompletedProcess(command, 0))
    assert sweep.train(Job("gla_r6", "tiny", None), tmp_path, []) is None


def test_a_bucket_holds_no_sweep(started):
    flags.FLAGS["sweep"].value = "gs://bucket/sweep"
    with pytest.raises(ConfigError, match="--sweep=gs://bucket/sweep.*give a folder of a file system"):
        sweep.main([])


def test_summaries_are_gathered(started, tmp_path):
    flags.FLAGS["models"].value = ["gla_*"]
    assert sweep.main([]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [SUMMARY] * 5


def test_each_seed_is_a_run_of_its_own(started):
    flags.FLAGS["models"].value, flags.FLAGS["seeds"].value = ["gla_r6"], ["3", "4"]
    assert sweep.main([]) == 0
    jobs = [job for job, _ in started]
    assert [job.name for job in jobs] == ["gla_r6-tiny-s3", "gla_r6-tiny-s4"]
    assert jobs[1].flags == ["--config=configs/gla_r6.py:tiny", "--config.train.seed=4"]


def test_one_seed_for_all_seeds_is_refused(started):
    flags.FLAGS["seeds"].value = ["3", "4"]
    with pytest.raises(ConfigError, match="--seeds and --config.train.seed are two ways to say one thing"):
        sweep.main(["--config.train.seed=5"])
    assert not started


def test_a_mistake_is_told_before_anything_starts(started):
    with pytest.raises(ConfigError, match="config.train.steps='many' must be of type int"):
        sweep.main(["--config.train.steps=many"])
    assert not started
