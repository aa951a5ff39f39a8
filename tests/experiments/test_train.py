"""The training command from start to end: what it leaves behind, and that nothing it survives changes a bit of it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import hybrid_jax.train.report
from experiments import train
from hybrid_jax.evals import evaluate
from hybrid_jax.train.metrics import read_rows
from hybrid_jax.train.step import make_program
from hybrid_jax.train.summary import show_again
from hybrid_jax.train.trace import Trace
from hybrid_jax.train.workdir import read_config, saved_steps
from tests.experiments.commands import CONFIG, run_train

FALLING = ["--config.optimizer.schedule=wsd", "--config.optimizer.decay_steps=3"]
FALLING += ["--config.checkpoint.keep=1", "--config.evaluation.every=None"]


def curve(workdir):
    """All that must not depend on how a run was stopped and started: losses, gradients and evaluations by step."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens", "loss_by_position", "evaluation")
    return [{key: row.get(key) for key in keys} for row in read_rows(workdir / "metrics.jsonl")]


def stop_at(monkeypatch, step, act):
    """Call ``act`` when the run reports ``step``."""
    report = hybrid_jax.train.report.Report.step

    def wrapped(self, reported, metrics):
        report(self, reported, metrics)
        if reported == step:
            act()

    monkeypatch.setattr(hybrid_jax.train.report.Report, "step", wrapped)


def test_a_run_leaves_behind_all_that_is_promised(trained):
    workdir, result = trained
    assert result.err == ""
    assert saved_steps(workdir) == [4, 8]
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "evaluation" in row] == [4, 8]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    summary = json.loads((workdir / "summary.json").read_text())
    evaluation = json.loads((workdir / "eval-8.json").read_text())
    assert summary["evaluation"] == rows[-1]["evaluation"] == {k: v for k, v in evaluation.items() if k not in ("step", "loss_by_position")}
    assert 0 < evaluation["unigram_bits_per_byte"] < evaluation["xz_bits_per_byte"]  # 512 bytes are too few for xz
    assert 0 <= evaluation["mqar_accuracy"] <= 1
    assert summary["step"] == 8 and summary["tokens"] == 8 * 4 * 32 and summary["peak_memory_bytes"] > 1e6
    assert re.fullmatch(r"[0-9a-f]{40}(\+[0-9a-f]{12})?|\+[0-9a-f]{12}", summary["git"])
    assert (workdir / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events*"))


@pytest.mark.parametrize("given", [None, "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_training_takes_most_of_a_gpus_memory_unless_told_otherwise(trained, monkeypatch, given):
    """Under one of the two names that JAX knows: it refuses both."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "0.5")
        if name != given:
            monkeypatch.delenv(name)
    run_train(trained[0])  # which has ended
    found = {name: value for name, value in os.environ.items() if name.endswith("CLIENT_MEM_FRACTION")}
    assert found == ({given: "0.5"} if given else {"XLA_CLIENT_MEM_FRACTION": "0.95"})


def test_a_run_says_what_it_does_and_what_comes_next(trained):
    workdir, result = trained
    evaluate = f"experiments.eval --workdir={workdir}"
    layers = "layers: 1 attention (attention: xla)"
    for said in ("step 0 of 8", "compiled in", "holds", layers, "step 8/8", "bits per byte", "after 8 steps", evaluate, "--prompt='def '"):
        assert said in result.out, said


@pytest.fixture(scope="module")
def falling(tmp_path_factory):
    """A run whose learning rate falls over its last steps, and two of whose steps are traced: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("falling") / "run"
    result = run_train(workdir, *FALLING, "--config.log.profile_steps=(2,3)")
    assert result.code == 0, result
    return workdir, result.out


def test_the_last_step_before_the_fall_is_kept_for_good(falling):
    workdir, printed = falling
    assert saved_steps(workdir) == [5, 8]
    assert "copy config.json, text.sha256, checkpoints/5 (of before" in printed


def test_steps_are_traced(falling):
    workdir, printed = falling
    (file,) = (workdir / "profile").rglob("*.xplane.pb")
    traced = file.read_bytes()
    assert f"steps 2 to 3 are traced in {workdir / 'profile'}" in printed and f"tensorboard --logdir={workdir}, under Profile" in printed
    assert b"train" in traced and b"jit_step" in traced


@pytest.mark.slow
def test_a_run_that_ended_goes_on_from_before_its_fall(falling, tmp_path):
    """By the copy that it says, to the bits of one that was that long from the first."""
    (tmp_path / "longer" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "text.sha256"):
        shutil.copy(falling[0] / name, tmp_path / "longer")
    shutil.copytree(falling[0] / "checkpoints" / "5", tmp_path / "longer" / "checkpoints" / "5")
    for name in ("longer", "at once"):
        assert run_train(tmp_path / name, *FALLING, "--config.train.steps=10").code == 0
    whole = curve(tmp_path / "at once")
    assert curve(tmp_path / "longer") == [row for row in whole if row["step"] > 5] and whole[-1]["step"] == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "schedule_free"}, "to train longer:       the same command with more --config.train.steps\n"),
        ({"schedule": "linear"}, "--from_run={workdir} --workdir=NEW, then the same command with --workdir=NEW: a new run"),
        ({"schedule": "wsd", "decay_steps": 2}, "--from_run={workdir} --workdir=NEW"),  # of before such steps were kept
    ],
)
def test_how_to_train_longer_depends_on_the_learning_rate(trained, capsys, changes, said):
    config = read_config(trained[0])
    show_again(trained[0], dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes)))
    assert said.format(workdir=trained[0]) in capsys.readouterr().out


def test_a_trace_ends_with_the_run_however_that_ends(tmp_path):
    for _ in range(2):  # while one is under way another cannot begin
        with pytest.raises(KeyError), Trace(tmp_path, (1, 5), print) as trace:
            trace.step(1, fail, None, iter([0]))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) >= 1


def fail(*_):
    raise KeyError("a step that fails")


def test_only_a_model_of_python_is_to_go_on_from_python(trained, capsys):
    workdir, _ = trained
    config = read_config(workdir)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="stores/mine"))
    assert show_again(workdir, config) == 0 and f"--workdir={workdir} --prompt='The'" in capsys.readouterr().out


def test_the_same_command_after_the_end_shows_the_summary_again(trained, monkeypatch):
    workdir, _ = trained
    monkeypatch.setattr("hybrid_jax.train.step.compile_step", None)  # nothing is computed
    result = run_train(workdir)
    assert result.code == 0 and "after 8 steps" in result.out
    assert saved_steps(workdir) == [4, 8]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch, capfd, number):
    workdir, handler = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), number))
        result = run_train(workdir)
    assert result.code == 128 + number
    assert capfd.readouterr().err == f"\n{number.name}: {train.STOPPING}\n"  # at once, not when the step is done
    step = saved_steps(workdir)[-1]
    assert 2 < step < 8
    assert f"{number.name}: stopped after step {step} of 8, which is saved. To continue: python -m experiments.train {CONFIG}" in result.out
    assert signal.getsignal(number) == handler
    again = run_train(workdir)
    assert again.code == 0 and f"step {step} of 8" in again.out
    assert curve(workdir) == curve(trained[0])


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint_to_the_same_bits(trained, tmp_path, monkeypatch):
    workdir, batches, evaluating = tmp_path / "run", evaluate.pipeline.evaluation_batches, []

    def crash():
        raise KeyError("crash")

    def begin(*given, **options):
        evaluating.append(1e6)  # seconds, by the clock below: an evaluation is no training
        return batches(*given, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        stop_at(patch, 6, crash)
        patch.setattr(evaluate.pipeline, "evaluation_batches", begin)
        patch.setattr(hybrid_jax.train.report, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(evaluating)))
        run_train(workdir)
    last = read_rows(workdir / "metrics.jsonl")[-1]
    assert saved_steps(workdir) == [4] and last["step"] == 6
    assert evaluating and last["tokens_per_second"] > 0.1  # of 128 tokens a step
    assert run_train(workdir).code == 0
    assert curve(workdir) == curve(trained[0])


def test_the_first_parameters_are_drawn_from_the_runs_seed(tmp_path, monkeypatch):
    keys = []

    def init(key):
        keys.append(key)
        raise KeyError("enough is known")

    monkeypatch.setattr("hybrid_jax.train.step.make_program", lambda *given: make_program(*given)._replace(init=init))
    with pytest.raises(KeyError):
        run_train(tmp_path / "run", "--config.train.seed=7")
    assert keys == [jax.random.key(7)]


def test_an_evaluation_that_a_kill_left_out_is_made_up_for(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    (workdir / "summary.json").unlink()
    (workdir / "eval-8.json").unlink()
    rows = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(rows[:-1]))
    result = run_train(workdir)
    assert result.code == 0 and "compiled in" not in result.out  # no step is left to do
    assert curve(workdir) == curve(trained[0])
    last = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row][-1]
    assert json.loads((workdir / "summary.json").read_text())["tokens_per_second"] == pytest.approx(last["tokens_per_second"])


@pytest.mark.slow
def test_a_run_given_more_steps_is_not_finished_by_its_old_summary(tmp_path, monkeypatch):
    """Killed between its last checkpoint and the evaluation of that."""
    workdir, options = tmp_path / "run", ["--config.optimizer.name=schedule_free", "--config.evaluation.every=None"]
    shorter, longer = ([*options, f"--config.train.steps={steps}"] for steps in (4, 6))
    assert run_train(workdir, *shorter).code == 0

    def kill(*_):
        raise KeyError("kill")

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(hybrid_jax.train.report.Report, "evaluation", kill)
        run_train(workdir, *longer)
    assert saved_steps(workdir)[-1] == 6
    assert run_train(workdir, *longer).code == 0
    summary, evaluation = (json.loads((workdir / name).read_text()) for name in ("summary.json", "eval-6.json"))
    assert summary["step"] == 6 and summary["evaluation"]["loss"] == evaluation["loss"]


@pytest.mark.parametrize("step, saved_every", [pytest.param(4, 4, marks=pytest.mark.slow), (4, 8), (8, 4)])
def test_a_signal_ends_an_evaluation_which_is_made_up_for(trained, tmp_path, monkeypatch, step, saved_every):
    """An evaluation may take longer than a machine that is taken away leaves."""
    workdir, batches, evaluations = tmp_path / "run", evaluate.pipeline.evaluation_batches, []

    def begin(*given, **options):
        evaluations.append(4 * (len(evaluations) + 1))
        if evaluations[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.pipeline, "evaluation_batches", begin)
        result = run_train(workdir, f"--config.checkpoint.every={saved_every}")
    assert result.code == 143 and f"stopped after step {step} of 8, which is saved" in result.out
    assert saved_steps(workdir)[-1] == step and not (workdir / f"eval-{step}.json").exists()
    assert run_train(workdir).code == 0
    assert curve(workdir) == curve(trained[0])


@pytest.mark.slow  # by the command; test_sharding.py has every kind of mesh
def test_eight_devices_train_to_the_losses_of_one(trained, tmp_path):
    workdir = tmp_path / "run"
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    result = run_train(workdir, *mesh, devices=None)
    assert result.code == 0 and "on 8 x" in result.out
    for row, expected in zip(curve(workdir), curve(trained[0]), strict=True):
        if row["loss"]:
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        else:
            assert row["evaluation"]["loss"] == pytest.approx(expected["evaluation"]["loss"], rel=1e-4)


def test_a_run_goes_on_on_another_number_of_devices(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    result = run_train(workdir, "--config.mesh.fsdp=4", "--config.mesh.tensor=2", devices=None)
    assert result.code == 0 and "step 4 of 8" in result.out
    losses, expected = ([row["loss"] for row in curve(folder) if row["loss"]] for folder in (workdir, trained[0]))
    assert losses[:4] == expected[:4]
    np.testing.assert_allclose(losses[4:], expected[4:], rtol=1e-4)


def test_a_run_that_diverges_stops_with_a_reason(tmp_path):
    result = run_train(tmp_path / "run", "--config.optimizer.learning_rate=1e30", "--config.train.bad_steps=2")
    assert result.code == 1
    assert result.err.count("\n") == 1 and "not finite 2 steps in a row" in result.err and "--config.optimizer.learning_rate" in result.err
    assert "the step is skipped (1 in a row)" in result.out


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(trained, tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", CONFIG, f"--workdir={workdir}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    kills = 0
    for rows in (1, 3, 6, 9):  # killed once it has written so many; the ninth is the evaluation after step 8
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            if (workdir / "metrics.jsonl").exists() and len(read_rows(workdir / "metrics.jsonl")) >= rows:
                process.kill()
                kills += 1
            time.sleep(0.01)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read().decode()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert kills >= 3
    assert [row["loss"] for row in curve(workdir)] == [row["loss"] for row in curve(trained[0])]
