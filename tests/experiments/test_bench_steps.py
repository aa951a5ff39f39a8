"""Whole training steps compiled ahead of time for TPUs: through the kernels, within a chip's memory."""

import importlib.util

import pytest

from experiments.benchmarks import steps, tpu_static

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'")
HBM = {"tpu:v4": 32, "tpu:v5e": 16, "tpu:v5p": 95, "tpu:v6e": 32, "tpu:tpu7x": 96}  # GiB a device
CONVOLVED = ("delta_net", "gated_delta_net")


def compiled(step, target):
    with tpu_static.compiler(target, schedule=False) as compiler:
        return compiler.call(steps.compile_for, step, target)


def check_kernels(row, family):
    found = row["implementations"]
    operators = found.pop(family)
    assert operators.pop("causal_conv", None) == (["xla"] if family in CONVOLVED else None)
    assert list(operators.values()) == [["pallas"]]
    assert found == {"attention": {"attention": ["pallas"]}}


def test_a_tiny_step_runs_the_kernels():
    row = compiled(steps.Step("hgrn_r6", "tiny", T=256), "tpu:v6e")
    assert row["devices"] == 4 and min(row["hbm_bytes"], row["held_bytes"]) > 1e6
    check_kernels(row, "hgrn")


@pytest.mark.slow
@pytest.mark.parametrize("family", steps.FAMILIES)
@pytest.mark.parametrize("size, target", [("340m", "tpu:v6e"), ("1b3", "tpu:v5e")])
def test_steps_of_the_study_fit_and_run_the_kernels(family, size, target):
    row = compiled(steps.Step(f"{family}_r6", size), target)
    assert row["held_bytes"] < HBM[target] * 2**30
    check_kernels(row, family)


def test_steps_are_named_by_patterns():
    assert len(steps.select([])) == 12
    assert [case.shape_name for case in steps.select(["gla*"])] == ["gla_r6_340m", "gla_r6_1b3"]
    with pytest.raises(ValueError, match="--shapes: nothing is called gpt; choose from hgrn_r6_340m"):
        steps.select(["gpt"])
