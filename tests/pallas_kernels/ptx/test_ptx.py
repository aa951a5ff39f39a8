"""The Hopper kernels as compiled for an H200, run on a CPU: they are right, and wait for what they need; planted faults are seen."""

import contextlib
import re
from functools import partial

import pytest

from experiments.compiled import gpu_topology
from experiments.compiled.process import Process
from tests.pallas_kernels.ptx import cases, emulated

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """:func:`.cases.run` in the compiler's process."""
    pytest.importorskip("jax_plugins.xla_cuda13")
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
        "attention of wide heads",
        *(f"{operator} by {axes}{pieces}" for operator in ("gated_linear_attention", "gated_delta_rule")
          for axes in ("head", "channel") for pieces in ("", " in pieces")),
        "gated_linear_attention of medium decays",
        "gated_delta_rule of medium decays",
    ],
)  # fmt: skip
def test_kernels_are_right_and_race_free(run, name):
    run(name)


SCAN, LINEAR, ATTENTION = "linear_scan", "gated_linear_attention", "attention"
CASES = {SCAN: "linear_scan", LINEAR: "gated_linear_attention by head", ATTENTION: "attention"}
WAIT = r"\{\s*\.reg \.pred\s+P1;[^}]*\}"
# A case, its kernel, what is replaced there by what, and what is said of it.
FAULTS = {
    "a fence removed": (SCAN, "forward", r"fence\.proxy\.async\S+;", "", "asynchronous read of what is not known"),
    "a wait for loads removed": (SCAN, "forward", WAIT, "", "more arrivals than a barrier waits for"),
    "a wrong phase": (SCAN, "backward", r"(try_wait\S+ P1, \[\S+\], )%r\d+", r"\g<1>0", "more arrivals|not known|all wait"),
    "a wait for stores removed": (SCAN, "forward", r"cp\S+wait_group\.read\s+\d;", "", "store over what is not known"),
    "no wait at the end": (SCAN, "forward", r"cp\S+wait_group(\.read)?\s+\d;", "", "exit before stores"),
    "an arrival removed": (LINEAR, "walk", r"mbarrier\.arrive\.release[^;]*;", "", "all wait"),
    "an arrival after a block removed": (ATTENTION, "of_queries", r"mbarrier\.arrive\.release[^;]*;", "", "all wait"),
    "a load over what is still stored": (ATTENTION, "d_queries", r"cp\S+wait_group\.read\s+\d;", "", "over what is not known to be read"),
    "barriers removed": (LINEAR, "gradients", r"bar\.sync\s+%r\d+, 128;", "", "not known"),
    "waits for products removed": (LINEAR, "gradients", r"wgmma\.wait_group\S+\s+0;", "", "over what is not known to be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(run, fault):
    operator, kernel, pattern, instead, message = FAULTS[fault]
    with pytest.raises(Exception, match=message):
        run(CASES[operator], change=partial(planted, f"{operator}_{kernel}", pattern, instead))


def planted(kernel, pattern, instead, name, ptx):
    assert name != kernel or re.search(pattern, ptx), "nothing to change"
    return re.sub(pattern, instead, ptx) if name == kernel else ptx
