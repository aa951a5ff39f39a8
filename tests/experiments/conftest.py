"""One finished run for all tests of commands."""

import shutil

import pytest

from tests.experiments.commands import run_train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of the tests' configuration, never interrupted, and what it printed: (workdir, result). Not to be changed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    result = run_train(workdir)
    assert result.code == 0, result
    return workdir, result


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """The folder of such a run, a module's own."""
    return shutil.copytree(trained[0], tmp_path_factory.mktemp("finished") / "run")
