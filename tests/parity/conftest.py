"""The parity tests compare with flash-linear-attention (fla) itself. Asked for and without it they fail: a skip would look like a pass."""

import importlib

import pytest


@pytest.fixture(scope="session")
def fla():
    """The module that builds and runs fla's models on the CPU."""
    try:
        return importlib.import_module("tests.parity.fla_models")
    except ImportError as error:
        pytest.fail(f"the parity tests need torch, transformers and fla ({error}): pip install -e '.[test,parity]'", pytrace=False)
