"""The convert command, and the runs that start from what it makes."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags

from experiments import cli, convert, train
from hybrid_jax.config import CheckpointConfig, ConfigError, MeshConfig
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.checkpoints import Checkpoints, load_params
from hybrid_jax.train.metrics import read_rows
from hybrid_jax.train.step import abstract_state
from hybrid_jax.train.workdir import claim, read_config, saved_steps
from tests.experiments.commands import run, run_eval
from tests.hybrid_jax import hf_folders
from tests.hybrid_jax.test_train_checkpoints import assert_same, random_state
from tests.hybrid_jax.train_runs import small_run


def run_convert(*arguments):
    for name in ("from_hf", "to_hf", "from_run", "to_dtype"):
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
        ((), "give one of --from_hf=FOLDER (to read), --to_hf=FOLDER (to write) and --from_run=RUN"),
        (("--from_hf=a", "--to_hf=b"), "give one of"),
        (("--from_hf=a",), "give the --workdir of the run"),
        (("--from_hf=a", "--workdir=b", "--to_dtype=float32"), "--to_dtype is of --to_hf"),
        (("--from_hf=a", "--workdir=b", "--step=0"), "--step is of --to_hf and --from_run"),
        (("--from_run=nowhere", "--workdir=b"), "nowhere holds no run"),
        (("--from_run=a", "--to_hf=b", "--workdir=c"), "give one of"),
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


def test_a_run_begins_with_the_parameters_of_another(tmp_path):
    """Of a model that fla has not, averaged by its optimiser; trained on with other windows, optimiser and number of steps."""
    config = small_run(
        model={"mixer": {"name": "gla", "heads": 2}, "attention": {"heads": 2, "rope_theta": None}, "layers": 2, "ratio": 2},
        optimizer={"name": "schedule_free"},
    )
    shapes = abstract_state(config, make_mesh(MeshConfig(), jax.devices()[:1])).state
    claim(tmp_path / "one", config)
    with Checkpoints(tmp_path / "one", CheckpointConfig()) as checkpoints:
        for step in (3, 5):
            checkpoints.save(random_state(shapes, step, step))
    (tmp_path / "one/huggingface").mkdir()
    (tmp_path / "one/huggingface/tokenizer.json").write_text("{}")

    result = run_convert(f"--from_run={tmp_path / 'one'}", "--step=3", f"--workdir={tmp_path / 'two'}")
    assert result.code == 0, result.err
    assert f"parameters of {tmp_path / 'one'}, step 3, at step 0" in result.out
    assert read_config(tmp_path / "two") == config and saved_steps(tmp_path / "two") == [0]
    assert (tmp_path / "two/huggingface/tokenizer.json").read_text() == "{}"
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    (_, theirs), (_, ours) = load_params(tmp_path / "one", config, mesh, 3), load_params(tmp_path / "two", config, mesh)
    assert_same(theirs, ours)
    given = ("--config.data.window=24", "--config.optimizer.name=adamw", "--config.train.steps=7", "--config.model.attention.window=8")
    changed = cli.load_run(list(given), workdir=str(tmp_path / "two")).config
    claim(tmp_path / "two", changed)  # what the training command begins with
    with pytest.raises(ConfigError, match="model.layers: 2 -> 4"):
        claim(tmp_path / "two", dataclasses.replace(changed, model=dataclasses.replace(changed.model, layers=4)))

    again = run_convert(f"--from_run={tmp_path / 'one'}", f"--workdir={tmp_path / 'two'}")
    assert again.code == 2 and "has checkpoints already: give another --workdir" in again.err
    missing = run_convert(f"--from_run={tmp_path / 'one'}", "--step=4", f"--workdir={tmp_path / 'three'}")
    assert missing.code == 2 and "has no checkpoint of step 4; it has 3, 5" in missing.err
