"""The evaluation command: the numbers of the training run, to the last bit."""

import json
import shutil

import pytest

import hybrid_jax
from hybrid_jax.train.metrics import read_rows
from tests.experiments.commands import run_eval, run_train


@pytest.fixture
def workdir(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def evaluations(workdir):
    return {row["step"]: row["evaluation"] for row in read_rows(workdir / "metrics.jsonl") if "evaluation" in row}


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


def test_a_model_loads_from_the_workdir(workdir):
    model = hybrid_jax.load(workdir, step=4)
    assert model.config.vocabulary == 264


def test_a_broken_newest_checkpoint_is_told_of_and_passed_over(workdir):
    for file in (workdir / "checkpoints" / "8").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="step 8 .* cannot be read"):
        result = run_eval(workdir)
    assert result.code == 0 and "step 4" in result.out


def test_what_was_trained_on_other_devices(workdir):
    """Of which there were twice as many: the same tokens, and all but rounding the same numbers."""
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"mesh": config["mesh"] | {"data": 2, "fsdp": 1}}))
    written = json.loads((workdir / "eval-8.json").read_text())
    result = run_eval(workdir)
    assert result.code == 0, result.err
    found = json.loads((workdir / "eval-8.json").read_text())
    assert found["tokens"] == written["tokens"] and found["loss"] == pytest.approx(written["loss"], rel=1e-6)
