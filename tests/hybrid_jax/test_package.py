"""What `import hybrid_jax` gives: a few names, each imported when it is first used."""

import importlib.metadata

import jax
import pytest
from flax import nnx
from ml_collections import ConfigDict

import hybrid_jax
from hybrid_jax import config

NAMES = {"Model", "build", "generate", "load", "stream"}


def test_its_names_are_listed():
    assert {*NAMES, "__version__"} <= set(dir(hybrid_jax))
    assert NAMES == set(hybrid_jax.__all__) and all(callable(getattr(hybrid_jax, name)) for name in NAMES)
    assert not hasattr(hybrid_jax, "sotre")


@pytest.mark.parametrize("name", ["config", "mixers"])
def test_its_modules_need_no_import_of_their_own(name, monkeypatch):
    monkeypatch.delattr(hybrid_jax, name, raising=False)  # as before anything has imported it
    assert getattr(hybrid_jax, name) is importlib.import_module(f"hybrid_jax.{name}") and name in dir(hybrid_jax)


def test_its_version_is_that_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"hybrid-jax": "1.2.3"}.get)
    assert hybrid_jax.__version__ == "1.2.3"

    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    with pytest.raises(AttributeError, match="once it is installed: pip install -e ."):
        getattr(hybrid_jax, "__version__")  # noqa: B009


def test_a_run_and_its_model_are_built_alike():
    run = config.RunConfig(model=config.ModelConfig(vocabulary=61, width=16, layers=1, ratio=None, mixer=config.HGRN()))
    models = [hybrid_jax.build(given, seed=3) for given in (run, run.model)]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *map(nnx.state, models)))


@pytest.mark.parametrize("given", ["configs/gla_r6.py", ConfigDict(), None, config.GLA(heads=2)], ids=lambda given: type(given).__name__)
def test_what_is_no_configuration_is_not_built(given):
    with pytest.raises(TypeError, match=rf"build takes a hybrid_jax.config.ModelConfig or RunConfig, got a {type(given).__name__}"):
        hybrid_jax.build(given)
