"""Runs in a bucket: trained, stopped and gone on with, evaluated and read as on disk, on a stand-in for Cloud Storage."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hybrid_jax
from experiments import generate, report
from hybrid_jax.train.metrics import Metrics, read_rows
from hybrid_jax.train.workdir import RunError, run_folder, saved_steps
from tests.experiments.commands import CONFIG, run, run_eval, run_train
from tests.experiments.test_train import curve, stop_at
from tests.fake_gcs import serve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gcs():
    with pytest.MonkeyPatch.context() as patch, serve(patch) as server:
        yield server


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """What the runs in a bucket must come to."""
    workdir = tmp_path_factory.mktemp("train") / "run"
    assert run_train(workdir).code == 0
    return workdir


@pytest.fixture(scope="module")
def finished(gcs):
    """A run in a bucket that was stopped on its way, and went on: its workdir, and what the two starts printed."""
    workdir = f"gs://{gcs.new_bucket()}/runs/gla"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        first = run_train(workdir)
    return run_folder(workdir), first, run_train(workdir)


def test_a_run_goes_on_and_comes_to_what_it_comes_to_on_disk(finished, on_disk):
    workdir, first, second = finished
    print(first, second)
    assert (first.code, second.code, first.err, second.err) == (0, 0, "", "")
    step = int(re.search(r"stopped after step (\d+) of 8, which is saved", first.out)[1])
    assert f"step {step} of 8" in second.out and f"in {workdir}" in second.out
    assert curve(workdir) == curve(on_disk)
