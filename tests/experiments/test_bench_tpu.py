"""Costs read from what the TPU compiler wrote: loops, calls of kernels, bytes; and one row from the compiler itself."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import schedule, tpu_chart, tpu_static
from experiments.compiled import hlo, targets
from experiments.compiled.collectives import collectives
from experiments.compiled.flops import flops
from hybrid_jax.config import ConfigError
from tests.experiments.test_bench import ROOT

BUNDLES = """\
     0   :  { %s1 = smov 0 /* copy for cssa */ }
   0x1 LB: > { %s2 = sphi %s1, %s3 /* phi copy */ } /* Start region 7 */
   0x2   : > { %s3 = sadd.s32 8, %s2 /* copy for cssa */ }
   0x3   : > { %p4 = scmp.ge.s32.totalorder %s3, 128 /* loop exit test */ }
   0x4   : > { %5 = sbr.rel (!%p4) target = $region7 }
   0x5   : > {} /* a comment
over lines */
   0x6   : > {}
   0x7   : > {}
   0x8   : > {} /* End region 7 */
   0x9   :  { %6 = sbr.rel (%p4) target = $region8 }
"""


def test_loops_are_weighted_by_their_trips():
    bundles = list(schedule._bundle_texts(BUNDLES))
    assert len(bundles) == 10
    assert schedule.trips(bundles) == ([1, *[16] * 8, 1], 0)
    assert schedule.trips([b.replace("smov 0", "smov %s0") for b in bundles]) == ([1] * 10, 1)
    # The grid's loop has two trips more than the grid has steps; a loop inside it does not.
    grid = "iteration_bounds: (2, 7)"
    assert schedule.trips([*bundles, grid])[0][1] == 14
    renames = {"%s1": "%t1", "%s2": "%t2", "%s3": "%t3", "%p4": "%q4", "region 7": "region 6", "$region7": "$region6"}
    outer = list(schedule._bundle_texts(functools.reduce(lambda text, pair: text.replace(*pair), renames.items(), BUNDLES)))
    assert schedule.trips([*outer[:2], *bundles, *outer[2:], grid])[0][4] == 14 * 16


CHOICE = """\
   0x0   :  { %1 = sbr.rel (%p9) target = $region3 }
   0x1   :  {}
   0x2   :  {}
   0x3   :  {}
   0x4   :  {}
   0x5   :  {} /* Start region 2 */
   0x6   :  { %2 = sbr.rel (!%p4) target = $region8 } /* Start/End empty region 3 */
   0x7   :  {}
   0x8   :  {}
   0x9   :  {}
   0xa   :  {}
   0xb   :  {} /* Start region 7 */
   0xc   :  {}
   0xd   :  { %3 = sbr.rel (%p4) target = $region10 } /* Start/End empty region 8 */
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   :  {}
  0x12   :  {} /* Start region 9 */
  0x13   :  {} /* Start/End empty region 10 */
"""


def test_of_two_branches_the_cheaper_one_counts(tmp_path):
    """A lone one, here that until region 3, counts as run."""
    assert schedule.choices(list(schedule._bundle_texts(CHOICE))) == [(range(11, 13), range(18, 19))]
    (tmp_path / "7-kernel-72-final_bundles.txt").write_text(CHOICE)
    kernel = schedule.kernels(tmp_path)["kernel"]
    assert (kernel.bundles, kernel.most) == (20 - 2, 20 - 1)


MODULE = """\
HloModule jit_f
%fused (p.0: f32[32,8], p.1: s32[]) -> f32[1,8] {
  %p.0 = f32[32,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
}

%body (b: (s32[], f32[32,8])) -> (s32[], f32[32,8]) {
  %b = (s32[], f32[32,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[32,8]{1,0} get-tuple-element(%b), index=1
  %slice = f32[1,8]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%fused
  %one = s32[] constant(1)
  %i.2 = s32[] copy(%i)
  %i.3 = s32[] add(%i.2, %one)
  ROOT %next = (s32[], f32[32,8]{1,0}) tuple(%i.3, %x)
}

%condition (c: (s32[], f32[32,8])) -> pred[] {
  %c = (s32[], f32[32,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(32)
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.0: bf16[32,8]) -> f32[32,8] {
  %x.0 = bf16[32,8]{1,0} parameter(0)
  %start = s32[] constant(0)
  %wide = f32[32,8]{1,0} convert(%x.0)
  %carry = (s32[], f32[32,8]{1,0}) tuple(%start, %wide)
  %loop = (s32[], f32[32,8]{1,0}) while(%carry), condition=%condition, body=%body
  ROOT %out = f32[32,8]{1,0} get-tuple-element(%loop), index=1
}
"""


PREFETCH = """\
HloModule jit_g
ENTRY %main (x.0: s8[64]) -> s8[16] {
  %x.0 = s8[64]{0:T(1024)(128)(4,1)} parameter(0)
  %slice-start = ((s8[64]{0:T(1024)(128)(4,1)}), s8[16]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%x.0), slice={[0:16]}
  ROOT %slice-done = s8[16]{0:T(1024)(128)(4,1)S(1)} slice-done(%slice-start)
}
"""


def test_what_is_read_of_an_array_is_a_slice_of_it():
    assert [(e.name, e.hbm_bytes) for e in hlo.Module(PREFETCH).executions] == [("slice-start", 16)]
    alone = "ENTRY %main (x.0: s8[64]) -> s8[16] {\n  %x.0 = s8[64]{0} parameter(0)\n  ROOT %y = s8[16]{0} slice(%x.0), slice={[0:16]}\n}\n"
    assert [(e.name, e.hbm_bytes) for e in hlo.Module(alone).executions] == [("y", 32)]  # and written


def test_an_array_that_a_kernel_takes_twice_is_read_once():
    twice = "ENTRY %main (x.0: s8[64]) -> s8[64] {\n  %x.0 = s8[64]{0} parameter(0)\n  ROOT %y = s8[64]{0} custom-call(%x.0, %x.0)\n}\n"
    assert [(e.name, e.hbm_bytes) for e in hlo.Module(twice).executions] == [("y", 128)]


def test_instructions_are_counted_by_the_trips_of_loops_and_slices_by_what_they_read():
    found = {e.name: e for e in hlo.Module(MODULE).executions}
    assert found["wide"] == hlo.Execution("wide", "main", 1, 32 * 8 * (2 + 4), True)
    # A row of x and the index are read from HBM; the result stays in VMEM.
    assert found["slice"] == hlo.Execution("slice", "body", 32, 8 * 4 + 4, True)
    unknown = hlo.Module(MODULE.replace("%start = s32[] constant(0)", "%start = s32[] parameter(1)"))
    assert {e.name: (e.count, e.known) for e in unknown.executions}["slice"] == (1, False)


CONDITIONAL = """\
HloModule jit_h
%dear (d: f32[8,8]) -> f32[8,8] {
  %d = f32[8,8]{1,0} parameter(0)
  %moved = f32[8,8]{1,0} copy(%d)
  %again = f32[8,8]{1,0} copy(%moved)
  ROOT %back = f32[8,8]{1,0} copy(%again)
}

%cheap (c: f32[8,8]) -> f32[8,8] {
  %c = f32[8,8]{1,0} parameter(0)
  ROOT %product = f32[8,8]{1,0} dot(%c, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (p: pred[], x: f32[8,8]) -> f32[8,8] {
  %p = pred[] parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  %negated = f32[8,8]{1,0} negate(%x)
  ROOT %y = f32[8,8]{1,0} conditional(%p, %negated, %negated), BRANCHES
}
"""


@pytest.mark.parametrize("said", ["true_computation=%dear, false_computation=%cheap", "branch_computations={%cheap, %dear, %dear}"])
def test_of_a_conditional_the_cheapest_branch_is_counted(said):
    """In bytes that with the product; in FLOPs that without: each is what no run is below."""
    module = hlo.Module(CONDITIONAL.replace("BRANCHES", said))
    assert {(e.name, e.count, e.hbm_bytes) for e in module.executions} == {("negated", 1, 512), ("product", 1, 512)}
    assert flops(module) == 0 and not collectives(module, 2)
    both = CONDITIONAL.replace("copy(%moved)", "dot(%moved, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}")
    assert flops(hlo.Module(both.replace("BRANCHES", said))) == 2 * 8**3
    summed = CONDITIONAL.replace("dot(%c, %c),", "all-reduce(%c), replica_groups={{0,1}},")  # the branch with the fewest bytes to HBM
    assert not collectives(hlo.Module(summed.replace("BRANCHES", said)), 2)
    everywhere = summed.replace("copy(%again)", "all-to-all(%again), replica_groups={{0,1}}")
    assert [one.kind for one in collectives(hlo.Module(everywhere.replace("BRANCHES", said)), 2)] == ["all-to-all"]


def test_of_a_cond_that_xla_has_compiled_one_branch_is_counted():
    def run(which, x):
        return jax.lax.cond(which, lambda x: jnp.sin(x @ x) @ x, lambda x: jnp.cos(x) @ x, x)

    compiled = jax.jit(run).lower(True, jnp.ones((8, 8))).compile()
    assert flops(hlo.Module(compiled.as_text())) == 2 * 8**3


def test_a_loop_that_xla_has_unrolled_has_fewer_trips():
    def trips(text):
        return {e.name: (e.count, e.known) for e in hlo.Module(text).executions}["slice"]

    assert trips(MODULE.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")) == (16, True)
    assert trips(MODULE.replace("%one = s32[] constant(1)", "%one = s32[] constant(5)")) == (7, True)
    assert trips(MODULE.replace("add(%i.2, %one)", "multiply(%i.2, %one)")) == (1, False)
    said = MODULE.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert trips(said) == (9, True)


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tpu:v6e needs the TPU compiler, libtpu: pip install -e '.\[tpu\]'"):
        tpu_static.suite("tpu:v6e").__enter__()


@pytest.mark.slow
def test_a_row_of_the_compiler(tmp_path):
    pytest.importorskip("libtpu")
    output = tmp_path / "rows.jsonl"
    words = ["--target=tpu:v6e", "--operators=linear_scan", "--shapes=tiny", "--implementations=pallas", f"--output={output}"]
    done = subprocess.run([sys.executable, "-m", "experiments.bench", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forward, both = map(json.loads, output.read_text().splitlines())
    assert (forward["target"], forward["platform"], forward["suite"]) == ("tpu:v6e", "tpu", "tpu_static")
    assert 0 < forward["bundles"] == forward["bundles_most"] < both["bundles"]
    assert forward["hbm_bytes"] >= forward["bytes"] / 2 and forward["vmem_bytes"] > 0
    assert forward["bound"] in ("hbm", "bundles") and forward["libtpu"] and max(both["errors"].values()) < both["tolerance"]


def test_the_picture_has_the_last_rows_that_are_no_failures(tmp_path):
    case = dict(suite="tpu_static", target="tpu:v6e", dtype="bfloat16", operator="linear_scan", shape="hgrn", implementation="pallas")
    case |= {"pass": "forward", "time": "2026-11-22"}
    cost = dict(bundles=8e3, bundles_per_token_and_head=2.0, bundle_s=1e-6, hbm_s=2e-6, unknown_loops=0)
    step = {"suite": "tpu_step", "target": "tpu:v6e", "config": "gla_r6:340m", "time": "2026-11-22"}
    rows = [case | cost, case | cost | {"bundles": 9e3}, case | {"failure": "no"}, case | cost | {"operator": "attention"}, step]
    file = tmp_path / "rows.jsonl"
    for some, drawn in ((rows, [rows[1]]), (rows[2:3], [])):
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        assert tpu_chart.recurrences(file, "tpu:v6e") == drawn
        assert tpu_chart.plot(file, "tpu:v6e").read_bytes().startswith(b"\x89PNG")
