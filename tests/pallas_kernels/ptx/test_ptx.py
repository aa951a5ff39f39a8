"""The Hopper kernels as they are compiled for an H200, run on a CPU: right, and no access that another one may overtake; faults are seen."""

import contextlib
import re
from functools import partial

import pytest

from experiments.benchmarks import gpu_topology
from experiments.benchmarks.process import Process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """:func:`.cases.run` in the compiler's process."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    from tests.pallas_kernels.ptx import cases, emulated

    dumps = tmp_path_factory.mktemp("ptx")
    with contextlib.closing(Process(gpu_topology.COMPILER, emulated.environment(dumps))) as process:
        yield lambda name, **keywords: process.call(partial(cases.run, name, dumps, **keywords))


@pytest.mark.parametrize(
    "name",
    [
        "linear_scan",
        "linear_scan in pieces",
        "causal_conv",
        "causal_conv of documents",
        "attention",
        "attention in a window",
        *(f"{operator} by {axes}{pieces}" for operator in ("gated_linear_attention", "gated_delta_rule")
          for axes in ("head", "channel") for pieces in ("", " in pieces")),
    ],
)  # fmt: skip
def test_kernels_are_right_and_race_free(run, name):
    run(name)


WAIT = r"\{\s*\.reg \.pred\s+P1;[^}]*\}"
FAULTS = {
    "a fence removed": ("linear_scan", "linear_scan_forward", r"fence\.proxy\.async\S+;", "", "asynchronous read of what is not known"),
    "a wait for loads removed": ("linear_scan", "linear_scan_forward", WAIT, "", "more arrivals than a barrier waits for"),
    "a wrong phase": ("linear_scan", "linear_scan_backward", r"(try_wait\S+ P1, \[\S+\], )%r\d+", r"\g<1>0", "more arrivals|not known|all wait"),
    "a wait for stores removed": ("linear_scan", "linear_scan_forward", r"cp\S+wait_group\.read\s+\d;", "", "store over what is not known"),
    "no wait at the end": ("linear_scan", "linear_scan_forward", r"cp\S+wait_group(\.read)?\s+\d;", "", "exit before stores"),
    "an arrival removed": ("gated_linear_attention by head", "gated_linear_attention_walk", r"mbarrier\.arrive\.release[^;]*;", "", "all wait"),
    "barriers removed": ("gated_linear_attention by head", "gated_linear_attention_gradients", r"bar\.sync\s+%r\d+, 128;", "", "not known"),
    "a wait for products removed": (
        "gated_linear_attention by head", "gated_linear_attention_gradients", r"wgmma\.wait_group\S+\s+0;", "", "over what is not known to be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(run, fault):
    name, kernel, pattern, instead, message = FAULTS[fault]
    with pytest.raises(Exception, match=message):
        run(name, change=partial(planted, kernel, pattern, instead))


def planted(kernel, pattern, instead, name, ptx):
    assert name != kernel or re.search(pattern, ptx), "nothing to change"
    return re.sub(pattern, instead, ptx) if name == kernel else ptx
