"""Runs in a bucket: trained, stopped and gone on with, evaluated and read as on disk, on a stand-in for Cloud Storage."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy

import hybrid_jax
from experiments import cli, report
from hybrid_jax.storage import run_folder
from hybrid_jax.train import metrics as module
from hybrid_jax.train.metrics import Metrics, read_rows
from hybrid_jax.train.trace import Trace
from hybrid_jax.train.workdir import RunError, saved_steps
from tests.experiments import test_processes
from tests.experiments.commands import CONFIG, run, run_eval, run_train
from tests.experiments.test_convert import run_convert
from tests.experiments.test_generate import run_generate
from tests.experiments.test_train import curve, stop_at
from tests.fake_gcs import serve
from tests.hybrid_jax import hf_folders
from tests.hybrid_jax.train_runs import small_run

ROOT = Path(__file__).parents[2]
QUIET = small_run(log={"tensorboard": False})


@pytest.fixture(scope="module")
def gcs():
    with pytest.MonkeyPatch.context() as patch, serve(patch) as server:
        yield server


@pytest.fixture
def on_disk(trained):
    """What the runs in a bucket must come to."""
    return trained[0]


@pytest.fixture(scope="module")
def finished(gcs):
    """A run in a bucket that was stopped on its way and went on: its workdir, and what the two starts printed."""
    workdir = f"gs://{gcs.new_bucket()}/runs/gla"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        first = run_train(workdir)
    return run_folder(workdir), first, run_train(workdir)


@pytest.fixture
def copied(gcs, finished):
    """The finished run in a bucket of its own, as if it had not come to its end: without its summary."""
    bucket = gcs.new_bucket()
    for name, content in gcs.files(str(finished[0])).items():
        if name != "summary.json":
            gcs.put(f"gs://{bucket}/run/{name}", content)
    return run_folder(f"gs://{bucket}/run")


def remove(gcs, folder, pattern):
    """Delete the objects below ``folder`` whose names match ``pattern``; how many they are."""
    bucket, _, prefix = str(folder).removeprefix("gs://").partition("/")
    names = [f"{prefix}/{name}" for name in gcs.files(str(folder)) if re.fullmatch(pattern, name)]
    for name in names:
        del gcs.buckets[bucket][name]
    return len(names)


def test_a_run_goes_on_and_comes_to_what_it_comes_to_on_disk(finished, on_disk):
    workdir, first, second = finished
    assert (first.code, second.code, first.err, second.err) == (cli.STOPPED, 0, "", "")
    step = int(re.search(r"stopped after step (\d+) of 8, which is saved", first.out)[1])
    assert f"step {step} of 8" in second.out and f"in {workdir}" in second.out
    assert curve(workdir) == curve(on_disk)


def test_a_run_leaves_in_the_bucket_what_it_leaves_on_disk(gcs, finished, on_disk):
    workdir, *_ = finished
    found = gcs.files(str(workdir))
    assert saved_steps(workdir)[-1] == 8
    tops = {name.partition("/")[0] for name in found}
    assert tops == {path.name for path in on_disk.iterdir()} - {"lock"}  # which buckets do not have
    assert found["config.json"] == (on_disk / "config.json").read_bytes()
    assert json.loads(found["eval-8.json"]) == json.loads((on_disk / "eval-8.json").read_text())
    assert found["summary.png"].startswith(b"\x89PNG")
    assert json.loads(found["summary.json"])["evaluation"] == json.loads((on_disk / "summary.json").read_text())["evaluation"]
    assert sum(name.startswith("tensorboard/events") for name in found) == 2  # a file a start


def test_the_same_command_after_the_end_shows_the_summary_again(finished):
    result = run_train(finished[0])
    assert result.code == 0 and "after 8 steps" in result.out and "compiled in" not in result.out


def test_it_is_evaluated_and_written_and_read(finished, on_disk, tmp_path, monkeypatch):
    workdir, *_ = finished
    result = run_eval(workdir, "--step=8")
    assert result.code == 0 and f"written to {workdir}/eval-8.json, drawn in {workdir}/summary.png" in result.out, result
    assert json.loads((workdir / "eval-8.json").read_text()) == json.loads((on_disk / "eval-8.json").read_text())
    result = run_eval(workdir, "--suite=held_out", "--lengths=32", "--tokens=64")
    assert result.code == 0 and (workdir / "evals" / "held_out-8.png").read_bytes().startswith(b"\x89PNG"), result

    prompt = ("--prompt=def", "--max_new_tokens=8")
    assert run_generate(f"--workdir={workdir}", *prompt) == run_generate(f"--workdir={on_disk}", *prompt)
    tokens = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(hybrid_jax.load(str(workdir))(tokens), hybrid_jax.load(on_disk)(tokens))

    monkeypatch.chdir(tmp_path)
    result = run(report.main, f"--runs={workdir.parent}/g*")
    assert result.code == 0 and "1 run," in result.out, result
    loss = json.loads((on_disk / "eval-8.json").read_text())["loss"]
    assert f"gla,width 16,attention,full,42,8,loss,{loss}\n" in Path("report/runs.csv").read_text()


def test_its_checkpoint_is_copied_and_evaluated_elsewhere(gcs, finished, on_disk, tmp_path):
    """The last step of docs/launching.md's walk-through: config.json and one checkpoint, on a laptop."""
    for name, content in gcs.files(str(finished[0])).items():
        if name == "config.json" or name.startswith("checkpoints/8/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    result = run_eval(tmp_path)
    assert result.code == 0, result
    assert json.loads((tmp_path / "eval-8.json").read_text()) == json.loads((on_disk / "eval-8.json").read_text())


def test_a_half_written_checkpoint_is_passed_over_and_an_unreadable_one_moved_aside(gcs, copied, on_disk):
    for name, content in gcs.files(f"{copied}/checkpoints/8").items():
        if name != "commit_success.txt":  # all in its place, but for the file that says that it is whole
            gcs.put(f"{copied}/checkpoints/9/{name}", content)
        if "/d/" in f"/{name}":
            gcs.put(f"{copied}/checkpoints/8/{name}", content[: len(content) // 2])
    assert saved_steps(copied)[-1] == 8
    result = run_train(copied)
    assert result.code == 0 and f"it is now {copied}/unreadable-8" in result.out, result
    assert "step 9" not in result.out and not gcs.files(f"{copied}/checkpoints/9")
    assert "commit_success.txt" in gcs.files(f"{copied}/unreadable-8") and saved_steps(copied)[-1] == 8
    assert curve(copied) == curve(on_disk)


# ---------------------------------------------------------------- programs


def start(workdir, *arguments):
    """The trainer in a process of its own, which keeps its programs where it does by itself."""
    command = [sys.executable, "-m", "experiments.train", CONFIG, f"--workdir={workdir}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=test_processes.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.slow
def test_a_second_start_compiles_nothing(gcs):
    workdir = run_folder(f"gs://{gcs.new_bucket()}/run")
    start(workdir)
    assert remove(gcs, workdir, "summary.json|checkpoints/8/.*") > 5
    kept = {name for name in gcs.files(f"{workdir}/compiled") if name.endswith("-cache")}
    gcs.requests.clear()
    assert "step 4 of 8" in start(workdir)
    assert kept == {name for name in gcs.files(f"{workdir}/compiled") if name.endswith("-cache")}
    wanted = {name.rpartition("/")[2] for _, _, name, _ in gcs.requests if name.endswith("-cache")}
    assert len(wanted) > 3 and wanted <= kept  # whatever was asked for was there
    assert {method for method, _, name, _ in gcs.requests if "/compiled/" in name} == {"GET"}


@pytest.mark.slow
def test_two_processes_share_a_bucket(gcs, on_disk):
    workdir = run_folder(f"gs://{gcs.new_bucket()}/run")
    codes, outputs = test_processes.finish(test_processes.start(workdir, 2))
    assert codes == [0, 0], outputs
    assert saved_steps(workdir) == [4, 8] and (workdir / "compiled").is_dir() and (workdir / "summary.png").exists()
    test_processes.same(test_processes.losses(workdir), test_processes.losses(on_disk))


# ---------------------------------------------------------------- metrics


def test_metrics_are_copied_every_minute_and_when_it_matters(gcs, monkeypatch):
    workdir = run_folder(f"gs://{gcs.new_bucket()}/run")

    def steps():
        return [row["step"] for row in read_rows(workdir / "metrics.jsonl")]

    metrics = Metrics(workdir, QUIET, "run")
    metrics.write(1, {"loss": 1.0})
    assert steps() == []
    monkeypatch.setattr(module, "COPIED_EVERY", 0.0)
    metrics.write(2, {"loss": 1.0})
    assert steps() == [1, 2]
    monkeypatch.undo()
    metrics.write(3, {"loss": 1.0})
    metrics.flush()
    metrics.write(4, {"loss": 1.0})
    assert steps() == [1, 2, 3]
    metrics.close()
    assert steps() == [1, 2, 3, 4]

    metrics = Metrics(workdir, QUIET, "run", start_step=2)  # goes on from step 2
    metrics.write(3, {"loss": 30.0})
    metrics.close()
    assert [(row["step"], row["loss"]) for row in read_rows(workdir / "metrics.jsonl")] == [(1, 1), (2, 1), (3, 30)]


def test_metrics_that_cannot_be_written_now_are_written_later(gcs, monkeypatch):
    monkeypatch.setattr(module, "COPIED_EVERY", 0.0)
    workdir = run_folder(f"gs://{gcs.new_bucket()}/run")
    metrics = Metrics(workdir, QUIET, "run")
    gcs.read_only.add(workdir.parent.name)
    with pytest.warns(UserWarning, match=f"metrics wait to be written to {workdir} .*Forbidden"):
        metrics.write(1, {"loss": 1.0})
    gcs.read_only.remove(workdir.parent.name)
    metrics.write(2, {"loss": 1.0})
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [1, 2]
    metrics.close()


def test_metrics_that_cannot_be_written_end_the_run_with_a_reason(gcs):
    workdir = run_folder(f"gs://{gcs.new_bucket()}/run")
    metrics = Metrics(workdir, QUIET, "run")
    gcs.read_only.add(workdir.parent.name)
    with pytest.raises(RunError, match=f"metrics could not be written to {workdir} .*Forbidden.* goes on from the last checkpoint"):
        metrics.close()


def test_a_trace_comes_to_the_bucket(gcs):
    workdir = run_folder(f"gs://{gcs.new_bucket()}/run")
    with Trace(workdir, (1, 1), print) as trace:
        assert trace.step(1, lambda state, batch: state + batch, 1, iter([2])) == 3
    assert any(name.endswith(".xplane.pb") for name in fsspec.filesystem("gcs").find(str(workdir / "profile")))


# ---------------------------------------------------------------- conversion


@pytest.mark.slow
def test_a_hugging_face_checkpoint_becomes_a_run_in_a_bucket_and_goes_back(gcs, tmp_path):
    workdir = f"gs://{gcs.new_bucket()}/theirs"
    described = hf_folders.fla_options("gla", num_hidden_layers=2, attn=dict(layers=[1], num_heads=2))
    tensors = hf_folders.random_tensors(described)
    hf_folders.write(tmp_path / "theirs", described, tensors)
    result = run_convert(f"--from_hf={tmp_path / 'theirs'}", f"--workdir={workdir}")
    assert result.code == 0 and saved_steps(run_folder(workdir)) == [0], result
    result = run_convert(f"--to_hf={tmp_path / 'back'}", f"--workdir={workdir}")
    assert result.code == 0, result
    found = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(np.array_equal(found[name], tensors[name]) for name in tensors)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("workdir", "said"),
    [
        ("s3://bucket/run", "s3://bucket/run cannot hold a run: give a folder, or gs://BUCKET/FOLDER"),
        ("gs://", "gs:// cannot hold a run"),
        ("gs://nobodys-bucket/run", "there is no bucket gs://nobodys-bucket, or you may not see it: make it, or give another folder"),
    ],
)
def test_what_can_hold_no_run(gcs, workdir, said):
    for result in (run_train(workdir), run_eval(workdir)):
        assert result.code == 2 and result.out == "" and result.err.startswith("error: ") and said in result.err
        assert result.err.count("\n") == 1


def test_what_a_bucket_needs_is_named(gcs, monkeypatch):
    workdir = f"gs://{gcs.new_bucket()}/run"
    result = run_eval(workdir)
    assert result.code == 2 and f"{workdir} holds no run" in result.err
    gcs.failures[:] = [401]
    result = run_train(workdir)
    assert result.code == 2 and "cannot be read" in result.err and "gcloud auth application-default login" in result.err
    bucket = run_folder(workdir).parent.name
    gcs.put(f"gs://{bucket}/other", b"")
    gcs.hidden.add(bucket)
    result = run_train(workdir)
    assert result.code == 2 and "roles/storage.legacyBucketReader" in result.err and result.err.count("\n") == 1
    assert not any(name.startswith("run/") for name in gcs.buckets[bucket])
    gcs.hidden.clear()
    gcs.read_only.add(bucket)
    result = run_train(workdir)
    assert result.code == 2 and f"cannot write to {workdir}: Forbidden" in result.err and result.err.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run_train(workdir)
    assert result.code == 2 and "gcsfs" in result.err and "pip install -e '.[gcs]'" in result.err and result.err.count("\n") == 1


def test_a_hugging_face_folder_must_be_on_disk(gcs):
    bucket = gcs.new_bucket()
    gcs.put(f"gs://{bucket}/theirs/config.json", b'{"model_type": "gla"}')
    for result in (
        run_generate(f"--workdir=gs://{bucket}/theirs", "--prompt_tokens=1"),
        run_convert(f"--from_hf=gs://{bucket}/theirs", "--workdir=run"),
        run_convert(f"--to_hf=gs://{bucket}/ours", "--workdir=run"),
    ):
        assert result.code == 2 and "gcloud storage cp --recursive" in result.err and result.err.count("\n") == 1
