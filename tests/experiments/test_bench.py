"""The benchmark on tiny shapes: whole rows, memory rows, and no time for what is wrong."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from experiments.benchmarks import batches, cases, correctness, decode, memory, rows, timing
from hybrid_jax import costs
from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.attention import xla as attention_xla
from pallas_kernels.causal_conv import api, reference
from pallas_kernels.causal_conv import tpu as conv_tpu
from pallas_kernels.gated_delta_rule import xla as delta_xla
from pallas_kernels.gated_linear_attention import tpu_blocking
from pallas_kernels.gated_linear_attention import xla as gla_xla
from pallas_kernels.linear_scan import api as scan_api
from pallas_kernels.linear_scan import shapes as scan_shapes
from pallas_kernels.linear_scan import tpu as scan_tpu
from pallas_kernels.linear_scan import xla as scan_xla

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    monkeypatch.setattr(timing, "matmul_rate", lambda dtype: 1e9)
    yield
    correctness._errors.cache_clear()


def measure(tmp_path, suite="operators", operators=(), implementations=(), dtype="float32"):
    selected = cases.select(list(operators), list(implementations), ["tiny*"], dtype)
    output = tmp_path / "rows" / "out.jsonl"
    measured = {"operators": timing.SUITE, "memory": memory.SUITE, "decode": decode.SUITE}[suite]
    found = rows.run([case for one in selected for case in measured.cases(one)], measured, output)
    assert [json.loads(line) for line in output.read_text().splitlines()] == found
    return found


QUICK = ("linear_scan", "attention", "causal_conv")  # the others compile for a minute


@pytest.mark.parametrize("operator", [pytest.param(o, marks=() if o in QUICK else pytest.mark.slow) for o in cases.OPERATORS])
def test_every_operator_passes_its_check_and_is_timed(tmp_path, capsys, operator):
    found = measure(tmp_path, operators=[operator])
    assert {"reference", "xla"} <= {row["implementation"] for row in found}
    assert not [row for row in found if "failure" in row]
    for row in found:
        low, high = row["quartiles_s"]
        assert 0 < low <= row["median_s"] <= high and row["repetitions"] >= batches.LEAST and row["compile_s"] > 0
        assert row["flop_per_s"] == pytest.approx(row["flops"] / row["median_s"])
        assert row["matmul_share"] == pytest.approx(row["flop_per_s"] / 1e9)
        assert row["temp_bytes"] >= 0 and row["bytes"] > 0
        assert all(row[name] for name in ("device", "platform", "python", "jax", "jaxlib", "time")) and "git" in row
        assert (row["implementation"] == "reference") == ("errors" not in row)
    for shape in {row["shape"] for row in found}:
        passes = [row["pass"] for row in found if (row["implementation"], row["shape"]) == ("xla", shape)]
        assert passes == ["forward", "forward_backward"]
    printed = capsys.readouterr().out
    assert f"1/{len(found)} {operator}" in printed and "of matmul" in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["--suite=decode", "--shapes=tiny*"], "--shapes has no meaning for --suite=decode, which takes --configs, --contexts, --batch"),
        (["--contexts=512"], "--contexts has no meaning for --suite=operators, which takes --operators"),
        (["--suite=step", "--target=tpu:v6e", "--dtype=bfloat16"], "--dtype has no meaning for --suite=step, which takes --configs"),
    ],
)
def test_flags_of_another_suite_are_refused(words, message):
    done = subprocess.run([sys.executable, "-m", "experiments.bench", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_errors_cover_outputs_and_gradients(tmp_path):
    row, _ = measure(tmp_path, operators=["causal_conv"], implementations=["xla"])
    gradients = {f"gradient of {name}" for name in ("x", "weight", "initial_state")}
    assert row["errors"].keys() == {"output", "final_state"} | gradients
    assert 0 < max(row["errors"].values()) < 1e-6


def test_bfloat16(tmp_path):
    found = measure(tmp_path, operators=["attention"], implementations=["xla"], dtype="bfloat16")
    assert all(1e-4 < max(row["errors"].values()) < row["tolerance"] for row in found)


def _is_slightly_off(x, weight, activation, initial_state, segments):
    y, state = reference.causal_conv(x, weight, activation, initial_state, segments)
    return y, state - 0.01 * initial_state


def _is_nan(x, weight, activation, initial_state, segments):
    y, state = reference.causal_conv(x, weight, activation, initial_state, segments)
    return y * jnp.nan, state


def _raises(x, weight, activation, initial_state, segments):
    raise ValueError("not on this device")


@pytest.mark.parametrize("wrong, message", [(_is_slightly_off, "final_state 1.0e-02"), (_is_nan, "output nan"), (_raises, "not on this")])
def test_what_is_wrong_is_refused(tmp_path, monkeypatch, wrong, message):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "wrong", wrong)
    found = measure(tmp_path, operators=["causal_conv"], implementations=["wrong", "xla"])
    failed = [row for row in found if "failure" in row]
    assert {row["implementation"] for row in failed} == {"wrong"} and len(failed) == 2
    for row in failed:
        assert message in row["failure"] and "median_s" not in row


def test_long_shapes_are_checked_at_a_length_of_their_operator(monkeypatch):
    monkeypatch.setattr(correctness, "WHOLE_T", 64)
    monkeypatch.setitem(correctness.CHECKED_T, "causal_conv", 32)
    (case,) = cases.select(["causal_conv"], ["xla"], ["tiny"], "float32")
    row = rows.measure(timing.SUITE.name, timing.SUITE.measure, case)
    assert (row["checked_shape"]["T"], row["sizes"]["T"]) == (32, case.shape.T)
    assert max(row["errors"].values()) < 1e-6
    monkeypatch.setattr(correctness, "WHOLE_T", case.shape.T)
    assert correctness.shortened(case) == case.shape


def test_what_is_checked_has_two_whole_chunks_and_a_part():
    """By the implementations' own chunks and blocks, those of TPUs and of XLA."""
    T = correctness.CHECKED_T
    recurrent = [tpu_blocking.DEFAULT.tokens, tpu_blocking.LARGER.tokens]
    chunks = {
        "linear_scan": [scan_tpu.DEFAULT.within(T["linear_scan"]).tokens, scan_xla.block_length(T["linear_scan"])],
        "gated_linear_attention": [*recurrent, gla_xla.CHUNK_PER_HEAD, gla_xla.CHUNK_PER_CHANNEL],
        "gated_delta_rule": [*recurrent, delta_xla.CHUNK, delta_xla.CHUNK_ON_CPU],
        "attention": [attention_tpu.block_length(T["attention"]), attention_xla.block_length(T["attention"])],
        "causal_conv": [conv_tpu.CHUNK.within(T["causal_conv"]).tokens],
    }
    assert chunks.keys() == T.keys() == set(cases.OPERATORS)
    assert all(2 * chunk < T[operator] and T[operator] % chunk for operator, found in chunks.items() for chunk in found), chunks
    longest = dict(linear_scan=scan_tpu.DEFAULT.tokens, attention=attention_tpu.LARGEST_BLOCK, causal_conv=conv_tpu.CHUNK.tokens)
    assert all(2 * chunk < T[operator] for operator, chunk in longest.items())


@pytest.mark.parametrize("lost", [1024, 2048])
def test_a_state_lost_between_chunks_is_found(monkeypatch, lost):
    """A scan that begins anew at the second chunk of 1,024 tokens, or the third, of a shape that is longer still."""

    def forgetful(decay, x, initial_state):
        return scan_api.IMPLEMENTATIONS["reference"](decay.at[:, lost].set(0), x, initial_state)

    monkeypatch.setitem(scan_api.IMPLEMENTATIONS, "wrong", forgetful)
    case = cases.Case("linear_scan", "wrong", "long", scan_shapes.Shape(B=1, T=4096, D=8), "float32", "forward")
    assert "not measured, errors above 0.0001" in correctness.check(case)["failure"]
    assert "failure" not in correctness.check(dataclasses.replace(case, implementation="xla"))


def test_a_failed_row_says_what_it_is_of():
    def run(case):
        raise RuntimeError("no room")

    (case,) = cases.select(["causal_conv"], ["xla"], ["tiny"], "float32")
    row = rows.measure("tpu_static", run, case, {"target": "tpu:v6e"})
    assert (row["target"], row["operator"], row["failure"]) == ("tpu:v6e", "causal_conv", "RuntimeError: no room")


def test_memory_suite(tmp_path):
    found = measure(tmp_path, suite="memory", operators=["attention"])
    assert all(row["sizes"]["T"] == memory.LENGTH and "median_s" not in row and row["pass"] == "forward_backward" for row in found)
    temporary = {row["implementation"]: row["temp_bytes"] for row in found}
    assert temporary["xla"] * 10 < temporary["reference"]


def test_decode_suite(tmp_path, monkeypatch):
    """By a clock that goes on by a second whenever it is looked at."""
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    selected = decode.select(["gla_r6:tiny", "transformer:tiny"], ["64"], batch=2)
    found = rows.run(selected, decode.SUITE, tmp_path / "out.jsonl")
    assert not [row for row in found if "failure" in row]
    ours, theirs = found
    model = decode._model_config("gla_r6:tiny")
    assert 6 * ours["kv_bytes"] == theirs["kv_bytes"] and theirs["state_bytes"] == 0
    assert ours["kv_bytes"] == 2 * costs.cache_bytes(model, 64) and ours["state_bytes"] == 2 * costs.state_bytes(model)
    assert (ours["median_s"], ours["repetitions"]) == (1, 31)  # of 33 tokens; the first waits for the step to be compiled
    assert ours["tokens_per_s"] == 2 and ours["prefill_tokens_per_s"] == 2 * (64 - 33)
    assert decode.plot(found, tmp_path / "decode.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "configs, contexts, message",
    [(["gla_r7:tiny"], ["64"], "no configuration file 'configs/gla_r7.py'"), (["gla_r6:tiny"], ["33"], "--contexts=33: needs a number of")],
)
def test_unknown_models_and_contexts(configs, contexts, message):
    with pytest.raises(ValueError, match=message):
        decode.select(configs, contexts, 1)


def command(*arguments, folder=ROOT):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "experiments.bench", *arguments]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_command_line(tmp_path):
    done = command("--suite=memory", "--operators=causal_conv", "--implementations=xla", "--shapes=tiny", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 row, 0 failures among them, appended to results/cpu.jsonl"
    assert len((tmp_path / "results/cpu.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["conv"], [], []), "--operators: nothing is called conv; choose from linear_scan, "),
        ((["attention"], ["cuda"], []), "--implementations: nothing is called cuda; choose from reference, xla"),
        ((["attention"], [], ["*340m", "*7b"]), r"--shapes: nothing is called \*7b; choose from tiny, transformer_340m"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        cases.select(*arguments, "float32")


def test_unknown_names_end_the_command_in_one_line():
    done = command("--operators=conv")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --operators: nothing is called conv") and len(done.stderr.splitlines()) == 1
