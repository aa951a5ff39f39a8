"""Every kernel compiles ahead of time for every TPU generation, on a machine without one, within VMEM and linear in T."""

import dataclasses
import importlib.util

import pytest

from experiments.benchmarks import cases, tpu_static
from experiments.compiled import targets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'"),
]
KERNELS = [operator for operator in cases.OPERATORS if "pallas" in cases.api(operator).IMPLEMENTATIONS]
VMEM = {"tpu:v4": 16, "tpu:v5e": 128, "tpu:v5p": 64, "tpu:v6e": 128, "tpu:tpu7x": 64}  # MiB a core


@pytest.fixture(scope="module", params=sorted(targets.TPUS))
def compiler(request):
    compiler = tpu_static.Compiler(request.param)
    yield compiler
    compiler.close()


def kernel_case(operator, shape_name, dtype, T=None):
    (case,) = cases.select([operator], ["pallas"], [shape_name], dtype)
    shape = dataclasses.replace(case.shape, T=T or case.shape.T)
    return dataclasses.replace(case, shape=shape, pass_name="forward_backward")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("operator", KERNELS)
def test_models_of_both_sizes(compiler, operator, dtype):
    names = [name for name in cases.select([operator], ["pallas"], [], dtype) if name.shape_name.endswith(("340m", "1b3"))]
    assert names
    for case in names:
        row = compiler.cost(dataclasses.replace(case, pass_name="forward_backward"))
        assert 0 < row["vmem_bytes"] < VMEM[compiler.target] * 2**20, (case, row)


def of_kernels(row, operator, fact):
    """Of our kernels; what XLA's fusions beside them take is its own choice."""
    return {kernel["name"]: kernel[fact] for kernel in row["kernels"] if kernel["name"].startswith(operator)}


@pytest.mark.parametrize("operator", sorted(set(KERNELS) - {"attention"}))
def test_cost_is_linear_in_time_and_vmem_does_not_depend_on_it(compiler, operator):
    name = next(name for name in cases.select([operator], ["pallas"], ["*340m"], "bfloat16")).shape_name
    short, long, longest = (compiler.cost(kernel_case(operator, name, "bfloat16", T)) for T in (4096, 65536, 131072))
    # Short arrays XLA may keep in VMEM: a kernel that takes its blocks from there is another one, some percent slower, without buffers.
    few, many = (sum(of_kernels(row, operator, "bundles").values()) for row in (short, long))
    assert 16 * 0.9 < many / few < 16 * 1.03
    assert longest["bundles"] / long["bundles"] == pytest.approx(2, rel=0.03)
    assert of_kernels(longest, operator, "vmem_bytes") == of_kernels(long, operator, "vmem_bytes") != {}
