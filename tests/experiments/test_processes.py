"""Training by several real processes: the losses of one, and what happens when one of them is lost."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import cli
from hybrid_jax import distributed
from hybrid_jax.config import ConfigError
from hybrid_jax.train.metrics import read_rows
from hybrid_jax.train.workdir import saved_steps
from tests import compiler

ROOT = Path(__file__).parents[2]
LONG = ("--config.train.steps=300", "--config.checkpoint.every=20", "--config.evaluation.every=300")  # long enough to lose a process


def environment():
    """Of a trainer in a process of its own: on a CPU, with all its programs kept where it keeps them by itself."""
    ours = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiler.QUICK}
    ours.pop("JAX_COMPILATION_CACHE_DIR", None)
    return ours | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # what takes a second depends on what else runs


def start(workdir, count, *arguments):
    """``count`` processes that train one run together; alone, without a word about others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.train", "--config=tests/experiments/commands.py", f"--workdir={workdir}", *arguments]
    command += ["--config.model.vocabulary=264", "--config.train.microbatch=1"]
    together = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
    return [
        subprocess.Popen(
            [*command, *([*together, f"--process={i}"] if count > 1 else [])],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes, timeout=240):
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_rows(workdir / "metrics.jsonl") if "loss" in row}


def evaluations(workdir):
    return {row["step"]: row["evaluation"]["loss"] for row in read_rows(workdir / "metrics.jsonl") if "evaluation" in row}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    codes, outputs = finish(start(workdir, 1))
    assert codes == [0], outputs
    return workdir


@pytest.fixture(scope="module")
def long_alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "long"
    codes, outputs = finish(start(workdir, 1, *LONG))
    assert codes == [0], outputs
    return workdir


def same(found, expected, rtol=5e-5):
    assert list(found) == list(expected)
    # sums over processes are taken in another order: float32 rounding, grown through the steps
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=rtol)


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        pytest.param(2, {}, marks=pytest.mark.slow),
        (2, {"fsdp": 1, "seq": 2}),  # the processes hold the same rows
        pytest.param(2, {"fsdp": 1, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(4, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_processes_change_no_loss(alone, tmp_path, count, mesh):
    codes, outputs = finish(start(tmp_path / "run", count, *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items())))
    assert codes == [0] * count, outputs
    same(losses(tmp_path / "run"), losses(alone))
    same(evaluations(tmp_path / "run"), evaluations(alone))
    assert "after 8 steps" in outputs[0]
    assert not any("loss" in output for output in outputs[1:])  # the first speaks for all


def test_a_second_start_compiles_nothing(alone):
    """Its programs are kept in its folder."""
    kept = set((alone / "compiled").glob("*-cache"))
    assert kept
    (alone / "summary.json").unlink()
    for folder in (alone / "checkpoints").glob("8"):
        shutil.rmtree(folder)
    codes, outputs = finish(start(alone, 1))
    assert codes == [0], outputs
    assert set((alone / "compiled").glob("*-cache")) == kept


def wait_for_step(workdir, step):
    for _ in range(2400):
        if any(number >= step for number in losses(workdir)):
            return
        time.sleep(0.1)
    raise AssertionError("training did not get to its step")


@pytest.mark.slow
def test_what_one_process_cannot_read_all_pass_over(alone, tmp_path):
    """Its shards are in files of their own: the others would read theirs."""
    workdir = tmp_path / "run"
    codes, outputs = finish(start(workdir, 2))
    assert codes == [0, 0], outputs
    (workdir / "summary.json").unlink()
    for file in (workdir / "checkpoints/8/params/ocdbt.process_1/d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    began = time.monotonic()
    codes, outputs = finish(start(workdir, 2))
    assert codes == [0, 0] and time.monotonic() - began < 120, outputs  # Orbax waits five minutes for a process
    assert "the checkpoint of step 8 cannot be read" in outputs[0] and "goes on from step 4" in outputs[0]
    assert (workdir / "unreadable-8").is_dir()
    same(losses(workdir), losses(alone))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_one_process_is_told_to_stop_and_all_save(tmp_path, number):
    processes = start(tmp_path / "run", 2, *LONG)
    wait_for_step(tmp_path / "run", 20)
    processes[1].send_signal(number)
    codes, outputs = finish(processes)
    assert codes == [cli.STOPPED] * 2, outputs
    step = int(re.search(r"SIGTERM: stopped after step (\d+) of 300, which is saved", outputs[0])[1])
    assert saved_steps(tmp_path / "run")[-1] == step and "stopped after" not in outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 1), (4, 2), (2, 4)])
def test_a_lost_process_ends_the_run_and_it_goes_on_with_any_number(long_alone, tmp_path, counts):
    workdir = tmp_path / "run"
    processes = start(workdir, counts[0], *LONG)
    wait_for_step(workdir, 50)
    processes[-1].kill()
    began = time.monotonic()
    codes, outputs = finish(processes)
    assert time.monotonic() - began < 150
    assert set(codes[:-1]) == {cli.STOPPED}, outputs  # for whoever started them: the same command goes on
    assert any("another process of this run" in output for output in outputs[:-1]), outputs
    codes, outputs = finish(start(workdir, counts[1], *LONG))
    assert codes == [0] * counts[1], outputs
    # Rounding has grown to 6e-5 in 300 steps; another batch, or the same in another order, is a loss that differs by some hundredths.
    same(losses(workdir), losses(long_alone), rtol=5e-4)
    steps = list(losses(long_alone).values())
    assert np.median(np.abs(np.diff(steps)) / steps[1:]) > 5e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("10.0.0.1:1234", 2, None), "give all of --coordinator"),
        ((None, 2, 0), "give all of --coordinator"),
        (("10.0.0.1:1234", 2, 2), "--process=2 must be from 0 to 1, below --processes=2"),
        (("10.0.0.1", 2, 0), "--coordinator=10.0.0.1 must be HOST:PORT"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        distributed.connect(*given)
