"""A model of fla's becomes a run of ours, trains, stops, goes on, and is fla's again: the commands, on folders that fla wrote."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hybrid_jax
from tests.helpers import relative_error
from tests.hybrid_jax.hf_folders import FAMILIES
from tests.parity.test_models import ATTN

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parent.parent.parent
SHORT = [
    "--config.data.window=32", "--config.train.steps=10", "--config.train.batch=2", "--config.train.microbatch=2",
    "--config.checkpoint.every=5", "--config.evaluation.tokens=128", "--config.evaluation.batch=2", "--config.optimizer.warmup_steps=2",
]  # fmt: skip


def run(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("model_type", FAMILIES)
def test_there_trained_and_back(model_type, fla, tmp_path):
    options = dict(hidden_size=32, num_hidden_layers=2, vocab_size=264, intermediate_size=48) | FAMILIES[model_type]
    theirs = fla.build(model_type, **options, **({} if model_type == "transformer" else {"attn": ATTN}))
    theirs.save_pretrained(tmp_path / "theirs")
    workdir = f"--workdir={tmp_path / 'run'}"

    run("experiments.convert", f"--from_hf={tmp_path / 'theirs'}", workdir)
    run("experiments.convert", f"--to_hf={tmp_path / 'same'}", workdir)
    same = fla.load(tmp_path / "same").state_dict()
    assert same.keys() == theirs.state_dict().keys()
    assert all(np.array_equal(same[name].numpy(), tensor.numpy()) for name, tensor in theirs.state_dict().items())

    assert "step 0 of 10" in run("experiments.train", workdir, *SHORT)
    shutil.rmtree(tmp_path / "run/checkpoints/10")  # as if killed after step 5
    assert "step 5 of 10" in run("experiments.train", workdir)
    run("experiments.convert", f"--to_hf={tmp_path / 'trained'}", workdir)

    tokens = np.random.default_rng(0).integers(0, 264, (2, 20))
    expected, _, _ = fla.run(fla.load(tmp_path / "trained"), tokens, tokens)
    before, _, _ = fla.run(theirs, tokens, tokens)
    ours = hybrid_jax.load(tmp_path / "run")(tokens)
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(before, expected) > 1e-3
