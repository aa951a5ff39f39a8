"""The evaluation command: the numbers of the training run, to the last bit."""

import json
import shutil

import jax
import pytest

import hybrid_jax
from experiments.eval import mesh_for
from hybrid_jax.config import MeshConfig
from hybrid_jax.model import abstract
from hybrid_jax.train.metrics import read_rows
from tests.experiments.commands import run_eval, run_train
from tests.hybrid_jax.train_runs import small_run


@pytest.fixture
def workdir(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def evaluations(workdir):
    return {row["step"]: row["evaluation"] for row in read_rows(workdir / "metrics.jsonl") if "evaluation" in row}


def test_the_mesh_of_an_evaluation(monkeypatch):
    """The run's own mesh; else parameters over all devices, or whole on each where they do not divide."""
    params, devices = abstract(small_run().model)[1], jax.devices()
    for config, count, shape in (
        (MeshConfig(data=2), 4, (2, 2)),
        (MeshConfig(data=2, fsdp=1), 4, (1, 4)),
        (MeshConfig(data=2, fsdp=1), 3, (3, 1)),
        (MeshConfig(), 3, (3, 1)),
    ):
        monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
        found = mesh_for(config, params).shape
        assert (found["data"], found["fsdp"]) == shape and found["seq"] == found["tensor"] == 1


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free"])
def test_every_checkpoint_evaluates_to_what_training_wrote(optimizer, workdir, tmp_path):
    if optimizer != "adamw":
        workdir = tmp_path / optimizer
        assert run_train(workdir, f"--config.optimizer.name={optimizer}").code == 0
    for step, arguments in ((8, []), (4, ["--step=4"])):
        written = json.loads((workdir / f"eval-{step}.json").read_text())
        for file in (f"eval-{step}.json", "summary.png"):
            (workdir / file).unlink()
        result = run_eval(workdir, *arguments)
        assert result.code == 0 and f"step {step}" in result.out and "xz -9" in result.out
        found = json.loads((workdir / f"eval-{step}.json").read_text())
        assert found == written
        assert (workdir / "summary.png").exists()
        assert {key: value for key, value in found.items() if key not in ("step", "loss_by_position")} == evaluations(workdir)[step]


def test_more_tokens_can_be_asked_for(workdir):
    assert run_eval(workdir, "--tokens=1000").code == 0
    found = json.loads((workdir / "eval-8-1000-tokens.json").read_text())
    assert found["tokens"] == 1000 and found["step"] == 8
    own = json.loads((workdir / "eval-8.json").read_text())  # is still what training wrote
    assert own["tokens"] == evaluations(workdir)[8]["tokens"] == 512 and own["loss"] == evaluations(workdir)[8]["loss"]


def test_programs_are_kept_in_the_run(workdir, monkeypatch):
    kept = []
    monkeypatch.setattr("experiments.eval.keep_programs", kept.append)
    assert run_eval(workdir, "--tokens=64").code == 0 and kept == [workdir]


def test_a_model_loads_from_the_workdir(workdir):
    model = hybrid_jax.load(workdir, step=4)
    assert model.config.vocabulary == 264


def test_a_broken_newest_checkpoint_is_told_of_and_passed_over(workdir):
    for file in (workdir / "checkpoints" / "8").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="step 8 .* cannot be read"):
        result = run_eval(workdir)
    assert result.code == 0 and "step 4" in result.out


@pytest.mark.parametrize("devices", [1, 3])
def test_what_was_trained_on_other_devices(workdir, devices):
    """On two, and there is one, or three, which do not divide the width: the same tokens, and all but rounding the same numbers."""
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"mesh": config["mesh"] | {"data": 2, "fsdp": 1}}))
    written = json.loads((workdir / "eval-8.json").read_text())
    result = run_eval(workdir, devices=devices)
    assert result.code == 0, result.err
    found = json.loads((workdir / "eval-8.json").read_text())
    assert found["tokens"] == written["tokens"] and found["loss"] == pytest.approx(written["loss"], rel=1e-6)
