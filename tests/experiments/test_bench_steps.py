"""Whole training steps compiled ahead of time for TPUs: through the kernels, within a chip's memory."""

import contextlib
import importlib.util

import pytest

from experiments.benchmarks import steps
from experiments.compiled import tpu_topology
from experiments.compiled.process import Process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'")
HBM = {"tpu:v5e": 16, "tpu:v6e": 32}  # GiB a device
CONVOLVED = ("delta_net", "gated_delta_net", "kda")


def compiled(case, target):
    with contextlib.closing(Process(tpu_topology.COMPILER, tpu_topology.environment(target))) as compiler:
        return compiler.call(steps.compile_for, case, target)


def check_kernels(row, family, convolution="pallas"):
    found = row["implementations"]
    operators = found.pop(family)
    assert operators.pop("causal_conv", None) == ([convolution] if family in CONVOLVED else None)
    assert list(operators.values()) == [["pallas"]]
    assert found == {"attention": {"attention": ["pallas"]}}


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("retnet", "gla", "gated_delta_net", "kda")]


@pytest.mark.parametrize("family", ["hgrn", *SLOW])  # each kernel, on a mesh
def test_a_tiny_step_runs_the_kernels(family):
    row = compiled(steps.Case(f"{family}_r6:tiny", window=256), "tpu:v6e")
    assert row["devices"] == 4 and min(row["hbm_bytes"], row["held_bytes"]) > 1e6
    check_kernels(row, family, convolution="xla")  # of 96 channels


@pytest.mark.slow
@pytest.mark.parametrize("config", steps.CONFIGS)
def test_steps_fit_and_run_the_kernels(config):
    target = "tpu:v6e" if config.endswith(":340m") else "tpu:v5e"
    row = compiled(steps.Case(config), target)
    assert row["held_bytes"] < HBM[target] * 2**30
    check_kernels(row, config.removesuffix(":340m").removesuffix(":1b3").removesuffix("_r6"))


def test_a_config_that_does_not_exist_is_refused():
    assert len(steps.select(steps.CONFIGS)) == 14
    with pytest.raises(ValueError, match="no configuration file 'configs/gpt.py'"):
        steps.select(["gpt:340m"])
