"""The 31 configurations of the study and those beyond it, and what `describe` says of them."""

import ast
import re
from pathlib import Path

import pytest
from rich.console import Console

from experiments import cli, describe
from experiments.configs import recipe
from hybrid_jax import config, costs

FILES = [cli.PACKAGE / "configs" / f"{name}.py" for name in cli.known_configs()]
STUDY = ["hgrn", "hgrn2", "retnet", "gla", "delta_net", "gated_delta_net"]
LINEAR = [*STUDY, "kda"]
RATIOS = {"pure": None, "r24": 24, "r12": 12, "r6": 6, "r3": 3}


def load(name: str, size: str) -> config.RunConfig:
    return cli.load_run([f"--config=configs/{name}.py:{size}"], "").config


def test_every_model_has_a_file():
    assert [file.stem for file in FILES] == sorted([f"{mixer}_{ratio}" for mixer in LINEAR for ratio in RATIOS] + ["transformer"])


@pytest.mark.parametrize("size", recipe.SIZES)
@pytest.mark.parametrize("mixer", LINEAR)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_file_is_the_model_its_name_says(mixer, ratio, size):
    model = load(f"{mixer}_{ratio}", size).model
    full = model.layer_kinds.count("attention")
    assert set(model.layer_kinds) - {"attention"} == {mixer}
    assert full * (RATIOS[ratio] or 1) == (model.layers if RATIOS[ratio] else 0)
    assert size in ("tiny", "recall") or model.layers == 24


@pytest.mark.parametrize("size, tokens, a_step", [("340m", 20e9, 2**19), ("1b3", 100e9, 2**20)])
def test_the_studys_models_are_trained_on_the_studys_tokens(size, tokens, a_step):
    for file in FILES:
        run = load(file.stem, size)
        assert run.train.batch * run.data.window == a_step
        assert abs(run.train.steps * a_step - tokens) < a_step / 2, file.stem


def slow_but(*endings):
    return [pytest.param(file, id=file.stem, marks=() if file.stem.endswith(endings) else pytest.mark.slow) for file in FILES]


@pytest.mark.parametrize("file", slow_but("_pure", "_r6", "transformer"))
def test_docstring_gives_the_commands_and_the_true_counts(file):
    doc = ast.get_docstring(ast.parse(file.read_text()))
    for size, suffix in (("tiny", ":tiny"), ("340m", ""), ("1b3", ":1b3")):
        said, unit = re.search(rf"--config=configs/{file.stem}\.py{suffix} +# ([\d.]+) ([MB])", doc).groups()
        count = costs.parameters(load(file.stem, size).model)
        assert float(said) == pytest.approx(count / {"M": 1e6, "B": 1e9}[unit], abs=0.051 if unit == "M" else 0.00051)
    beyond = file.stem.rpartition("_")[0] in set(LINEAR) - set(STUDY)
    assert ("Beyond the study" in doc) == beyond and ("The study reports" in doc) == (not beyond)


def test_unknown_size_names_the_sizes():
    with pytest.raises(config.ConfigError, match="size '70b' is unknown; choose one of tiny, recall, 340m, 1b3"):
        load("gla_r6", "70b")


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("hgrn_r3", "340m").model.ratio == 3
    Path("configs").mkdir()
    Path("configs/hgrn_r3.py").write_text(
        "from experiments.configs import recipe\ndef get_config(size): return recipe.get_config('hgrn', size, ratio=2)\n"
    )
    assert load("hgrn_r3", "340m").model.ratio == 2


RETURNS = "from hybrid_jax.config import RunConfig, TrainConfig\ndef get_config(): return "


def test_a_file_may_return_the_configuration_itself(tmp_path):
    (tmp_path / "mine.py").write_text(RETURNS + "RunConfig(train=TrainConfig(steps=7))\n")
    run = cli.load_run([f"--config={tmp_path}/mine.py", "--config.model.width=512"], "")
    assert (run.name, run.config.train.steps, run.config.model.width) == ("mine", 7, 512)


@pytest.mark.parametrize("value", ["{'train': {'steps': 7}}", "None", "RunConfig"])
def test_a_file_that_returns_something_else_is_refused(value, tmp_path):
    (tmp_path / "mine.py").write_text(RETURNS + value + "\n")
    with pytest.raises(config.ConfigError, match="mine.py returns a (dict|NoneType|type), needs a .*RunConfig or a ConfigDict"):
        cli.load_run([f"--config={tmp_path}/mine.py"], "")


def test_describe_says_what_the_model_is():
    run = cli.load_run(["--config=configs/gla_r6.py:1b3"], "")
    said = dict(describe.rows(run.config.model, 4096))
    assert said["parameters"] == f"{costs.parameters(run.config.model):,}"
    assert said["layers"] == "4 x (5 gla + 1 attention)"
    assert said["full-attention layers"] == "5, 11, 17, 23"
    assert said["KV cache per sequence of 4,096 tokens"] == "134,217,728 bytes"
    for name, full in (("gla_pure", "none"), ("transformer", "all")):
        assert dict(describe.rows(load(name, "340m").model, 4096))["full-attention layers"] == full


def test_describe_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(describe, "Console", lambda: Console(width=120))
    cli.flags.FLAGS(["describe"])
    describe.main(cli.load_run(["--config=configs/transformer.py:tiny"], ""))
    assert "full-attention layers" in capsys.readouterr().out
