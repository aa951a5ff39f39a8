"""The parity tests compare with flash-linear-attention (fla) and lm-evaluation-harness themselves.

Asked for and without those they fail: a skip would look like a pass.
"""

import importlib

import pytest


@pytest.fixture(scope="session")
def fla():
    """The module that builds and runs fla's models on the CPU."""
    try:
        return importlib.import_module("tests.parity.fla_models")
    except ImportError as error:
        pytest.fail(f"the parity tests need torch, transformers and fla ({error}): pip install -e '.[test,parity]'", pytrace=False)


@pytest.fixture(scope="session")
def ruler_harness():
    """The module that has lm-evaluation-harness make RULER's prompts."""
    try:
        return importlib.import_module("tests.parity.ruler_harness")
    except ImportError as error:
        pytest.fail(
            f"RULER's parity tests need lm_eval and what its extra ruler brings ({error}): pip install -e '.[test,eval]'", pytrace=False
        )
