"""docs/extending.md: its recurrence, written out as it stands there, is a mixer like the others; and the ways in which one is not found."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import hybrid_jax
from experiments import cli, describe, train
from hybrid_jax import config, costs, mixers
from hybrid_jax.hf.options import fla_options
from tests.experiments.commands import run, run_eval
from tests.helpers import relative_error

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
MIXER, MODEL = re.findall(r"```python\n(.*?)```", PAGE, re.S)
SHORT = (
    "--config.model.width=32", "--config.data.window=32", "--config.train.steps=2", "--config.train.batch=2", "--config.train.microbatch=2",
    "--config.evaluation.tokens=256", "--config.evaluation.batch=2",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the page's two files, from which it can be imported; afterwards nobody knows the mixer any more."""
    (tmp_path / "rg_lru.py").write_text(MIXER)
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mixers, "MIXERS", dict(mixers.MIXERS))
    known = dict(config.MIXERS)
    yield tmp_path
    sys.modules.pop("rg_lru", None)
    config.MIXERS.clear()
    config.MIXERS.update(known)


def installed(folder):
    """As `pip install` leaves it beside a package that has this entry point."""
    entry_points = re.search(r'\[project.entry-points."(.*)"\]\n\s*(.*)', PAGE)
    info = folder / "rg_lru-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rg-lru\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{entry_points[1]}]\n{entry_points[2].replace(chr(34), '')}\n")
    importlib.invalidate_caches()


def forgotten():
    """A process that has not imported it yet."""
    del sys.modules["rg_lru"], config.MIXERS["rg_lru"]


def test_a_run_of_it_is_trained_found_again_and_evaluated(folder):
    trained = run(train.main, "--config=my_model.py", "--workdir=run", *SHORT)
    assert trained.code == 0 and "layers: 5 rg_lru (causal_conv: xla, linear_scan: xla); 1 attention" in trained.out, trained.out
    forgotten()
    lost = run_eval(folder / "run")
    assert lost.code == 2 and "config.model.mixer.name='rg_lru' is no mixer; choose one of hgrn, " in lost.err
    installed(folder)
    found = run_eval(folder / "run")
    assert found.code == 0 and (folder / "run/eval-2.json").exists(), found.err


@pytest.mark.usefixtures("one_device")
def test_it_is_decoded_to_the_same_logits_and_costs_what_it_says(folder):
    model = dataclasses.replace(cli.load_run(["--config=my_model.py"]).config.model, width=32, layers=2, ratio=2)
    built = hybrid_jax.build(model, seed=0)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, (2, 13))
    expected, cache, found = built(tokens), built.empty_cache(2, 13), []
    real = np.ones((2, 1), bool)
    step = jax.jit(lambda params, token, cache: nnx.merge(graph, params).extend(token, real, cache))
    graph, params = nnx.split(built)
    for token in tokens.T[:, :, None]:
        hidden, cache = step(params, token, cache)
        found.append(built.logits(hidden))
    assert relative_error(np.concatenate(found, axis=1), expected) < 1e-5
    assert hybrid_jax.cache.held_bytes(cache) == (2 * costs.cache_bytes(model, 13), 2 * costs.state_bytes(model))
    both = built(np.concatenate([tokens[:1], tokens[1:]], axis=1), np.repeat([[1, 2]], 13, axis=1))  # two documents in a row
    assert relative_error(both[0], np.concatenate(expected, axis=0)) < 1e-5


def test_what_is_missing_is_named(folder):
    model = cli.load_run(["--config=my_model.py"]).config.model
    with pytest.raises(config.ConfigError, match="model.mixer 'rg_lru' cannot be written for fla, which has no such layer"):
        fla_options(model)
    del mixers.MIXERS[type(model.mixer)]
    with pytest.raises(config.ConfigError, match=r"no module of mixer 'rg_lru': hybrid_jax.mixers.MIXERS\[RGLRU\] = ..."):
        mixers.build(model.mixer, model, nnx.Rngs(0))
    with pytest.raises(config.ConfigError, match="there is a mixer 'gla' already, hybrid_jax.config.mixers.GLA: give another name"):
        type("GLA", (config.Mixer,), {}, name="gla", state_flops=5)


def test_it_is_described(folder):
    described = run(describe.main, "--config=my_model.py", "--context=64")
    assert described.code == 0 and "5 rg_lru, 1 attention" in described.out
