"""Every command and line of Python in the README is run: `pip` and `pytest` by CI, the others here, made short."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from experiments import cli
from hybrid_jax import sharding
from hybrid_jax.train.feed import batch_shapes
from hybrid_jax.train.step import make_program
from tests import compiler
from tests.hybrid_jax import hf_folders

README = (Path(__file__).parent.parent / "README.md").read_text()
ROOT = Path(__file__).parent.parent
# What makes a run short; the model, its size and its data stay what the command says.
SHORT = ["--config.train.steps=2", "--config.evaluation.tokens=256", "--config.data.mqar.examples=1"]
SMALL = ["--config.train.batch=2", "--config.train.microbatch=2", "--config.evaluation.batch=2"]
FEWER = {"train.steps=50": "train.steps=2", "--step=100": "--step=2", "experiments.sweep": "experiments.sweep --models=hgrn_pure"}
FEWER |= {"--tokens=100000": "--tokens=2000", "--tokens=16384": "--tokens=2048", "--pairs=2,4,8": "--pairs=2,4 --examples=8"}
SMALLER = ["--config.train.batch=1", "--config.data.window=64", "--config.evaluation.batch=1"]  # for the 340M and 1.3B models


def commands() -> list[str]:
    """Lines of the README's shell blocks, and commands in its tables, each once."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [part.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines() for part in line.split("&&")]
    tables = re.findall(r"^\|.*`(python -m [^`]+)` *\|$", README, re.M)
    return list(dict.fromkeys([line for line in lines if line] + tables))


OURS = [command for command in commands() if command.startswith("python -m ")]


def is_slow(command: str) -> bool:
    """Whether it starts a model of the study's size, which takes minutes and gigabytes."""
    return "experiments.train" in command and ":tiny" not in command and "--config=" in command


def is_like_another(command: str) -> bool:
    """Whether it differs from one before by a flag, or a size, alone that has tests of its own."""
    return "--config.model.width=192" in command or "--step=100" in command or ":recall" in command


def shorter(command: str) -> str:
    for words, fewer in FEWER.items():
        command = command.replace(words, fewer)
    return command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the README's commands read, and what they then leave for one another."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_texts").mkdir()
    for i in range(30):
        (folder / f"my_texts/{i}.txt").write_text(f"Text number {i}. " * 40)
    (folder / "fineweb-edu/sample/100BT").mkdir(parents=True)
    table = pyarrow.table({"text": [f"Document {i} says what it says. " * 9 for i in range(2000)], "id": [str(i) for i in range(2000)]})
    pyarrow.parquet.write_table(table, folder / "fineweb-edu/sample/100BT/000_00000.parquet")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(table["text"].to_pylist(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = hf_folders.fla_options("gla", vocab_size=400, attn=hf_folders.ATTN)  # 1.3B in its name alone
    hf_folders.write(folder / "gla-1.3B", described, hf_folders.random_tensors(described))
    shutil.copy(folder / "tokenizer.json", folder / "gla-1.3B")
    return folder


def run(command: str, folder: Path) -> str:
    words = shlex.split(command)
    if "experiments.train" in command:
        given = {word.split("=")[0] for word in words}
        words += [extra for extra in SHORT + (SMALLER if is_slow(command) else SMALL) if extra.split("=")[0] not in given]
    # many commands, few programs, each for a moment
    quick = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": compiler.QUICK} | quick
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_has_its_commands():
    assert commands()[:4] == [
        "pip install -e .",
        "python -m experiments.train --config=configs/gla_r6.py:tiny",
        "pip install -e '.[test]'",
        "pytest",
    ]
    assert all(command.split()[0] in ("pip", "pytest", "python") for command in commands())
    assert len(OURS) >= 10


@pytest.mark.timeout(1200)
def test_the_quick_commands_work_in_the_order_of_the_readme(folder):
    for command in OURS:
        if not is_slow(command) and not is_like_another(command):
            assert run(shorter(command), folder)


@pytest.mark.slow
def test_those_like_another_work_too(folder):
    for command in (OURS[0], *filter(is_like_another, OURS)):
        assert run(shorter(command), folder)


def test_the_python_works_in_the_order_of_the_readme(folder, tmp_path, monkeypatch, capsys):
    """On a small Hugging Face folder in the place of a run: `hybrid_jax.load` takes either."""
    shutil.copytree(folder / "gla-1.3B", tmp_path / "runs/gla_r6-tiny")
    monkeypatch.chdir(tmp_path)
    blocks, names = re.findall(r"```python\n(.*?)```", README, re.S), {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (*np.shape(names["tokens"]), 400) and "['" in capsys.readouterr().out
    assert names["run"].config.model.layers == 12 and names["y"].shape == (2, 100, 64)
    assert names["output"].shape == names["v"].shape and names["state"].shape == (2, 4, 32, 32)
    (tmp_path / "my_model.py").write_text(blocks[-1])
    assert cli.load_run(["--config=my_model.py"]).config == names["get_config"]()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_large_models_start_and_step(folder):
    stores = [command for command in OURS if "experiments.tokenize" in command]
    for command in stores:
        run(command, folder)
    for command in OURS:
        if not is_slow(command) or ":1b3" in command:
            continue
        assert "peak memory" in run(command, folder)
    summaries = [json.loads(file.read_text()) for file in folder.glob("runs/*/summary.json")]
    assert summaries and all(summary["step"] == 2 for summary in summaries)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in OURS if is_slow(command) and ":1b3" in command])
def test_the_largest_models_lower(command):
    """Parameters and optimiser of a 1.3B model take 16 GB, more than a test should: its step is lowered, not run."""
    config = cli.load_run([word for word in shlex.split(command) if word.startswith("--config")], "").config
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    program = make_program(config, mesh)
    assert "while" in program.step.lower(program.state, batch_shapes(config, mesh)).as_text()
