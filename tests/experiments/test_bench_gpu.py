"""Costs read from what the GPU compiler wrote: ptxas's report, the launch, loops of the assembled program; and one row of the compiler."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import pytest

from experiments.benchmarks import cases, correctness, gpu_static, sass
from experiments.compiled import hlo, targets
from hybrid_jax.config import ConfigError
from pallas_kernels.linear_scan import gpu
from tests.experiments.test_bench import ROOT

PTXAS = """\
ptxas info    : Compiling entry function 'scale_kernel' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 2 barriers, 1 bytes smem
"""
MODULE = """\
module @scale {
  %c98352_i32 = arith.constant 98352 : i32
  %one = arith.constant 1 : index
  %c8 = arith.constant 8 : index
  %c16 = arith.constant 16 : index
  %c128 = arith.constant 128 : index
  %7 = gpu.launch async [%5] blocks(%a, %b, %c) in (%d = %c8, %e = %one, %f = %c16) threads(%g, %h, %i) in (%j = %c128, %k = %one, \
%l = %one) dynamic_shared_memory_size %c98352_i32 {
"""
# A loop of 16 trips around a loop that waits and one of two trips more a time, and code out of the way that leads back.
SASS = """\
   -:-:-:-:04        /*0000*/                   UMOV UR4, URZ
   -:-:-:Y:02        /*0010*/              @!P3 EXIT
.L_x_0:
   -:-:-:Y:01        /*0020*/                   IMAD.MOV.U32 R2, RZ, RZ, 0x4
.L_x_1:
   -:-:1:Y:02        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R4
 3&1:-:-:Y:05        /*0040*/              @!P1 BRA `(.L_x_1)
.L_x_2:
   -:-:-:Y:03        /*0050*/                   IADD3 R2, R2, 0x2, RZ
   -:-:-:Y:02        /*0060*/                   ISETP.GE.AND P2, PT, R2.reuse, 0x8, PT
   -:-:-:Y:06        /*0070*/              @!P2 BRA `(.L_x_2)
.L_x_3:
   -:-:-:Y:01        /*0080*/                   UIADD3 UR4, UR4, 0x1, URZ
   -:-:-:Y:02        /*0090*/                   UISETP.NE.U32.AND UP2, UPT, UR4, 0x10, UPT
   -:-:-:Y:02        /*00a0*/                   PLOP3.LUT P1, PT, PT, PT, UP2, 0x80, 0x0
   -:-:-:Y:07        /*00b0*/               @P1 BRA `(.L_x_0)
   -:-:-:Y:05        /*00c0*/                   EXIT
   -:-:-:Y:05        /*00d0*/                   BRA `(.L_x_3)
.L_x_9:
   -:-:-:-:00        /*00e0*/                   BRA `(.L_x_9)
   -:-:-:-:00        /*00f0*/                   NOP
"""


def test_what_ptxas_reports():
    facts = {"registers": 40, "stack_bytes": 16, "spill_bytes": 20}
    assert sass.resources(PTXAS) == facts
    warning = "ptxas warning : Registers are spilled to local memory in function 'body', 8 bytes spill stores, 12 bytes spill loads\n"
    assert sass.resources(warning + PTXAS) == facts


def test_how_a_kernel_is_launched():
    assert sass.launch(MODULE) == {"ctas": 128, "threads": 128, "smem_bytes": 98352}
    assert sass.launch(MODULE.replace("%c16 = arith", "%other = arith"))["ctas"] is None


def test_loops_are_weighted_by_their_trips():
    program = sass.instructions(SASS)
    assert [i.name for i in program][-2:] == ["EXIT", "BRA"] and len(program) == 14
    assert sass.trips(program) == ([1, 1, *[16] * 3, *[32] * 3, *[16] * 4, 1, 1], 0)
    found = sass.issued(SASS)
    assert found["instructions"] == 2 + 3 * 16 + 3 * 32 + 4 * 16 + 2
    assert found["cycles"] == 4 + 2 + 16 * (1 + 2 + 5) + 32 * (3 + 2 + 6) + 16 * (1 + 2 + 2 + 7) + 5 + 5
    assert found["mix"]["BRA"] == 16 + 32 + 16 + 1


@pytest.mark.parametrize("zero", ["HFMA2.MMA R2, -RZ, RZ, 0, 0", "CS2R R2, SRZ", "CS2R.32 R2, SRZ", "MOV R2, RZ"])
def test_counters_that_start_at_nothing_and_steps_with_a_carry(zero):
    text = SASS.replace("IMAD.MOV.U32 R2, RZ, RZ, 0x4", zero).replace("IADD3 R2, R2, 0x2", "IADD3 R2, P4, R2, 0x2")
    assert sass.trips(sass.instructions(text)) == ([1, 1, *[16] * 3, *[64] * 3, *[16] * 4, 1, 1], 0)


def test_a_pair_of_registers_is_set_at_once():
    text = re.sub(r"\bR2\b", "R3", SASS)
    for zero, unknown in (("CS2R R2, SRZ", 0), ("CS2R.32 R2, SRZ", 1), ("HFMA2.MMA R3, -RZ, RZ, 0, 5.9604644775390625e-08", 1)):
        assert sass.trips(sass.instructions(text.replace("IMAD.MOV.U32 R3, RZ, RZ, 0x4", zero)))[1] == unknown, zero


def test_a_loop_without_a_constant_is_counted_once_and_said():
    for old, new in (("UR4, 0x10", "UR4, UR9"), ("UMOV UR4, URZ", "UMOV UR4, UR7"), ("UR4, UR4, 0x1,", "UR4, UR5, 0x1,")):
        weights, unknown = sass.trips(sass.instructions(SASS.replace(old, new)))
        assert (weights[2], weights[5], unknown) == (1, 2, 1), old


def test_kernels_are_read_in_the_order_they_were_compiled_in(tmp_path):
    for name in ("scale_10", "scale_9"):
        (tmp_path / f"{name}.ptxas").write_text(PTXAS.replace("40", name[6:]))
        ending = "before_layout_inference.txt" if name == "scale_9" else "mlir-passes.log"
        (tmp_path / f"{name}.{ending}").write_text(MODULE)
        (tmp_path / f"{name}.sass_ctrl").write_text(SASS)
    found = sass.kernels(tmp_path)
    assert [(k.name, k.registers, k.ctas, k.unknown_loops) for k in found] == [("scale", 9, 128, 0), ("scale", 10, 128, 0)]
    (tmp_path / "scale_9.sass_ctrl").unlink()  # no disassembler
    assert sass.kernels(tmp_path)[0].instructions is None


def kernel(**facts):
    given = {"name": "scale", "registers": 40, "spill_bytes": 0, "stack_bytes": 0, "smem_bytes": 98352, "threads": 128, "ctas": 128}
    return sass.Kernel(**given | facts)


@pytest.mark.parametrize(
    "facts, ctas",
    [
        ({}, 2),
        ({"smem_bytes": 0}, 12),
        ({"smem_bytes": 0, "registers": 16}, 16),
        ({"registers": 168, "threads": 384}, 1),
        ({"threads": None}, None),
    ],
)
def test_how_many_blocks_fit_a_multiprocessor(facts, ctas):
    assert gpu_static.ctas_per_sm(kernel(**facts)) == ctas


HLO = """\
HloModule jit_f
ENTRY %main (x.0: bf16[1024,1024]) -> bf16[1024,1024] {
  %x.0 = bf16[1024,1024]{1,0} parameter(0)
  %a = bf16[1024,1024]{1,0} custom-call(%x.0), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/scale/mpmd_map"}
  ROOT %b = bf16[1024,1024]{1,0} custom-call(%a), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/vjp/scale/mpmd_map"}
}
"""


def test_the_longest_floor_binds():
    row = gpu_static.cost(HLO, [kernel(instructions=1000, cycles=4000), kernel(instructions=1000, cycles=4000)])
    assert row["hbm_bytes"] == 4 * 2**21 and [k["executions"] for k in row["kernels"]] == [1, 1]
    target = targets.GPUS["gpu:h200"]
    found = gpu_static.floors(row | {"flops": 0}, target, "bfloat16")
    assert found["hbm_s"] == 2**23 / 4.8e12
    assert found["stalls_s"] == pytest.approx(2 * 4000 / 1.98e9)  # all blocks at once
    assert found["issue_s"] == pytest.approx(2 * 1000 * 128 / 132 / 1.98e9)
    assert found["bound"] == "stalls" and found["in_turn_s"] == pytest.approx(found["stalls_s"])

    def moving(bytes_per_s):
        chip = target.chip._replace(bytes_per_s=bytes_per_s)
        return gpu_static.floors(row | {"flops": 0}, dataclasses.replace(target, chip=chip), "bfloat16")

    slow_memory = moving(1e12)
    assert slow_memory["in_turn_s"] == pytest.approx(slow_memory["hbm_s"])
    row["kernels"][0]["cycles"] *= 2  # 8000, the other's 4000, and either kernel's bytes take 6000: none of the sums is more than 12000
    mixed = moving(2**22 / 6000 * 1.98e9)
    assert mixed["in_turn_s"] == pytest.approx((8000 + 6000) / 1.98e9)
    assert gpu_static.floors(row | {"flops": 989e12}, target, "bfloat16")["bound"] == "flops"


BESIDE = """\
HloModule jit_g
%update (p.0: f32[8,64], p.1: f32[1,64], p.2: s32[]) -> f32[8,64] {
  %p.0 = f32[8,64]{1,0} parameter(0)
  %p.1 = f32[1,64]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  ROOT %u = f32[8,64]{1,0} dynamic-update-slice(%p.0, %p.1, %p.2, %p.2)
}

ENTRY %main (x.0: f32[8,64], y.0: f32[1,64], i.0: s32[]) -> f32[8,64] {
  %x.0 = f32[8,64]{1,0} parameter(0)
  %y.0 = f32[1,64]{1,0} parameter(1)
  %i.0 = s32[] parameter(2)
  %s = ((f32[8,64]{1,0}, f32[1,64]{1,0}, s32[]), f32[8,64]{1,0}, u32[]) fusion-start(%x.0, %y.0, %i.0), kind=kLoop, calls=%update
  ROOT %d = f32[8,64]{1,0} fusion-done(%s)
}
"""


RENAMED = """\
HloModule jit_h
%rows (p.0: f32[8,64], p.1: s32[]) -> f32[64] {
  %p.0 = f32[8,64]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %b = f32[8,1,64]{2,1,0} bitcast(%p.0)
  %zero = s32[] constant(0)
  %row = f32[1,1,64]{2,1,0} dynamic-slice(%b, %p.1, %zero, %zero), dynamic_slice_sizes={1,1,64}
  %first = f32[1,64]{1,0} slice(%p.0), slice={[0:1], [0:64]}
  %one = f32[64]{0} bitcast(%row)
  %other = f32[64]{0} bitcast(%first)
  ROOT %sum = f32[64]{0} add(%one, %other)
}

ENTRY %main (x.0: f32[8,64], i.0: s32[]) -> f32[64] {
  %x.0 = f32[8,64]{1,0} parameter(0)
  %i.0 = s32[] parameter(1)
  ROOT %f = f32[64]{0} fusion(%x.0, %i.0), kind=kLoop, calls=%rows
}
"""


def test_of_an_array_that_is_sliced_under_another_name_slices_are_read():
    assert [(e.name, e.hbm_bytes) for e in hlo.Module(RENAMED).executions] == [("f", 256 + 256 + 4 + 256)]


def test_a_fusion_that_runs_beside_others_is_counted_once():
    assert [(e.name, e.hbm_bytes) for e in hlo.Module(BESIDE).executions] == [("s", 256 + 256 + 4)]


def test_shapes_are_those_of_a_step_and_small_where_they_are_interpreted():
    (case,) = cases.select(["linear_scan"], ["pallas"], ["hgrn_340m"], "bfloat16")
    longer = cases.at_lengths(case, [2048, 32768])
    assert [(c.shape.B, c.shape.T, c.shape_name) for c in longer] == [(16, 2048, "hgrn_340m T=2048"), (1, 32768, "hgrn_340m T=32768")]
    small = gpu_static.small(longer[0].shape)
    assert (small.B, small.T, small.D) == (1, 128, 128)
    (case,) = cases.select(["gated_delta_rule"], ["xla"], ["tiny_head"], "bfloat16")
    small = gpu_static.small(case.shape)
    assert (small.B, small.T, small.H, small.HV, small.K) == (1, 96, 1, 2, 16)
    assert cases.at_lengths(case, [2048]) == [case]
    (packed,) = cases.select(["attention"], ["pallas"], ["packed_340m"], "bfloat16")
    small = gpu_static.small(dataclasses.replace(packed.shape, H=8, HK=2))
    assert (small.T, small.H, small.HK) == (128, 4, 1)


def test_kernels_are_found_by_what_there_is():
    taken = {case.operator for case in cases.select([], ["pallas"], [], "bfloat16") if gpu_static.takes(case)}
    assert taken == {path.parent.name for path in (ROOT / "pallas_kernels").glob("*/gpu.py")} >= {"linear_scan"}
    assert all(gpu_static.takes(case) for case in cases.select([], ["xla"], [], "bfloat16"))


def test_what_the_interpreter_does_not_know_is_compiled_unchecked_and_what_it_finds_wrong_is_not(monkeypatch):
    (case,) = cases.select(["linear_scan"], ["pallas"], ["tiny"], "bfloat16")
    monkeypatch.setattr(gpu_static, "small", lambda shape: dataclasses.replace(shape, B=1, T=16))

    def instead(body):
        monkeypatch.setattr(gpu, "linear_scan", body)
        correctness._errors.cache_clear()
        return gpu_static.interpreted_check(case)

    def unknown(decay, x, initial_state):
        raise NotImplementedError("wgmma of what\nand more")

    assert instead(unknown) == {"unchecked": f"the interpreter of jax {jax.__version__}: NotImplementedError: wgmma of what"}
    assert "not measured, errors above" in instead(lambda decay, x, initial_state: (2 * x, initial_state))["failure"]


def test_a_kernel_is_checked_in_the_interpreter(monkeypatch):
    (case,) = cases.select(["linear_scan"], ["pallas"], ["tiny"], "bfloat16")
    monkeypatch.setattr(gpu_static, "small", lambda shape: dataclasses.replace(shape, B=1, T=16))
    correctness._errors.cache_clear()
    row = gpu_static.interpreted_check(case)
    assert 0 < max(row["errors"].values()) < row["tolerance"] and row["checked_shape"]["T"] == 16


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs JAX's CUDA plugin and CUDA's assembler: pip install -e '.\[cuda13\]'"):
        gpu_static.suite("gpu:h200").__enter__()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--target=gpu:h200,tpu:v6e"], "TPUs and GPUs have rows of their own; take one kind at a time"),
        (["--suite=step"], "--suite=step needs a --target"),
        (["--target=gpu:h200", "--suite=decode"], "--suite=decode is measured on the local device"),
        (["--target=gpu:h300"], "no such chip; choose from tpu:v4"),
    ],
)
def test_targets_that_cannot_be(words, message):
    done = subprocess.run([sys.executable, "-m", "experiments.bench", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.slow
def test_a_row_of_the_compiler(tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13")
    output = tmp_path / "rows.jsonl"
    words = ["--target=gpu:h200", "--operators=linear_scan", "--shapes=tiny", "--dtype=bfloat16", f"--output={output}"]
    done = subprocess.run([sys.executable, "-m", "experiments.bench", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {(row["implementation"], row["pass"]): row for row in map(json.loads, output.read_text().splitlines())}
    ours, xlas = rows["pallas", "forward_backward"], rows["xla", "forward_backward"]
    assert (ours["target"], ours["platform"], ours["suite"], ours["device"]) == ("gpu:h200", "gpu", "gpu_static", "NVIDIA H200")
    assert [k["name"] for k in ours["kernels"]] == ["linear_scan_forward", "linear_scan_backward"] and not xlas["kernels"]
    for kernel in ours["kernels"]:
        assert kernel["spill_bytes"] == 0 and kernel["executions"] == 1 and kernel["threads"] == 128 and kernel["ctas_per_sm"] >= 2
    assert 0 < ours["hbm_bytes"] < xlas["hbm_bytes"] and max(ours["errors"].values()) < ours["tolerance"]


@pytest.mark.slow
def test_a_step_is_compiled_with_the_kernels(tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13")
    output = tmp_path / "rows.jsonl"
    words = ["--target=gpu:h200", "--suite=step", "--configs=hgrn_r6:340m", f"--output={output}"]
    done = subprocess.run([sys.executable, "-m", "experiments.bench", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in map(json.loads, output.read_text().splitlines()):
        assert row["held_bytes"] < 141e9 and row["tokens"] == 32768
        assert row["implementations"] == {"hgrn": {"linear_scan": ["pallas"]}, "attention": {"attention": ["pallas"]}}
        assert {"linear_scan_backward", "attention_d_keys"} <= set(row["kernels"])
        assert all(kernel["spill_bytes"] == 0 for kernel in row["kernels"].values())
