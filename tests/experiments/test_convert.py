"""The convert command, and the runs that start from what it makes."""

import shutil

import numpy as np
import pytest
import safetensors.numpy
from absl import flags

from experiments import convert, train
from hybrid_jax.train.metrics import read_rows
from tests.experiments.commands import run, run_eval
from tests.hybrid_jax import hf_folders


def run_convert(*arguments):
    for name in ("from_hf", "to_hf", "to_dtype"):
        flags.FLAGS[name].unparse()
    return run(convert.main, *arguments)


SHORT = (
    "--config.data.window=32", "--config.train.steps=10", "--config.train.batch=2", "--config.train.microbatch=2",
    "--config.evaluation.tokens=256", "--config.evaluation.batch=2", "--config.checkpoint.every=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    described = hf_folders.fla_options("gla", vocab_size=264, attn=hf_folders.ATTN)
    hf_folders.write(folder / "theirs", described, hf_folders.random_tensors(described))
    result = run_convert(f"--from_hf={folder / 'theirs'}", f"--workdir={folder / 'run'}")
    assert result.code == 0, result.err
    assert "parameters at step 0. To go on from there: python -m experiments.train --workdir=" in result.out
    return folder / "run"


@pytest.mark.slow  # the README's commands, which are tested too, are these without a stop in between
def test_evaluated_trained_resumed_and_given_back(workdir):
    evaluated = run_eval(workdir)
    assert evaluated.code == 0, evaluated.err
    assert (workdir / "eval-0.json").exists()

    result = run(train.main, f"--workdir={workdir}", *SHORT)
    assert result.code == 0, result.err
    assert "step 0 of 10" in result.out
    rows = read_rows(workdir / "metrics.jsonl")
    shutil.rmtree(workdir / "checkpoints/10")  # as if killed before the end
    again = run(train.main, f"--workdir={workdir}")
    assert again.code == 0 and "step 8 of 10" in again.out
    assert [row["loss"] for row in read_rows(workdir / "metrics.jsonl") if "loss" in row] == [row["loss"] for row in rows if "loss" in row]

    back = run_convert(f"--to_hf={workdir.parent / 'back'}", f"--workdir={workdir}", "--to_dtype=bfloat16")
    assert back.code == 0, back.err
    first = safetensors.numpy.load_file(workdir.parent / "theirs/model.safetensors")
    last = safetensors.numpy.load_file(workdir.parent / "back/model.safetensors")
    assert first.keys() == last.keys()
    assert all(last[name].dtype == hf_folders.BFLOAT16 for name in last)
    assert not np.array_equal(first["lm_head.weight"], last["lm_head.weight"].astype(np.float32))


def test_the_model_of_a_converted_run_is_settled(workdir, tmp_path):
    result = run(train.main, f"--workdir={workdir}", "--config.model.layers=5")
    assert result.code == 2 and "model.layers: 4 -> 5" in result.err


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((), "give one of --from_hf=FOLDER (to read) and --to_hf=FOLDER (to write)"),
        (("--from_hf=a", "--to_hf=b"), "give one of"),
        (("--from_hf=a",), "give the --workdir of the run"),
        (("--from_hf=a", "--workdir=b", "--to_dtype=float32"), "--to_dtype and --step are of --to_hf"),
        (("--from_hf=nowhere", "--workdir=b"), "nowhere holds no Hugging Face model: it has no config.json"),
        (("--to_hf=a", "--workdir=nowhere", "--dtype=bfloat16"), "--dtype is of --from_hf"),
        (("--from_hf=a", "--workdir=b", "--dtype=float16"), "dtype=float16"),
        (("--to_hf=a", "--workdir=nowhere"), "nowhere holds no run"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, told):
    result = run_convert(*arguments)
    assert result.code == 2 and told in result.err and not result.out


def test_a_run_is_not_overwritten(workdir):
    result = run_convert(f"--from_hf={workdir.parent / 'theirs'}", f"--workdir={workdir}")
    assert result.code == 2 and "has checkpoints already: give another --workdir" in result.err and not result.out
