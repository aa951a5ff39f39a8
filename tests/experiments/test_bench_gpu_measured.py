"""--suite=gpu as far as a CPU goes: whole rows of tiny shapes, what is measured and in which order, and a peer that is not there."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.benchmarks import ahead, batches, cases, correctness, fla_peer, gpu, gpu_steps, rows
from experiments.benchmarks.gpu import Runs
from experiments.compiled import process
from experiments.compiled.process import Here
from experiments.configs import recipe
from experiments.revision import revision
from pallas_kernels.attention import shapes as attention_shapes
from tests.experiments.test_bench import ROOT


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(batches, "SECONDS", 0.01)
    monkeypatch.setattr(gpu_steps, "STEP_SECONDS", 0.01)
    monkeypatch.setattr(batches, "BATCH", 0.001)
    monkeypatch.setattr(gpu, "CHECKED_T", 32)
    monkeypatch.setattr(gpu, "rates", lambda: {"bytes_per_s": 1e9, "matmul_flop_per_s": 1e10})
    yield
    correctness._errors.cache_clear()


HERE = Runs(Here(), Here())


def tiny(implementation="xla", operator="linear_scan"):
    (case,) = cases.select([operator], ["xla"], ["tiny*"], "bfloat16")[:1]
    return dataclasses.replace(case, implementation=implementation, pass_name="forward_backward")


def test_an_operator_is_checked_and_timed():
    row = gpu.measure(tiny(), HERE)
    low, high = row["quartiles_s"]
    assert 0 < low <= row["median_s"] <= high and row["repetitions"] >= batches.LEAST and "seconds" not in row
    assert row["checked_shape"] == {"B": 1, "T": 32, "D": 32} and 0 < max(row["errors"].values()) < row["tolerance"]
    assert row["bandwidth_share"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
    assert row["matmul_share"] == pytest.approx(row["flops"] / row["median_s"] / 1e10)
    outputs = 2 * 96 * 32 * (2 + 2 + 4) + 2 * 2 * 32 * 4  # h, dx, the gradient of the decay, two states
    assert row["peak_bytes"] >= outputs


def test_a_peer_that_is_not_installed_has_a_row_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    suite = gpu.suite(HERE, everything, until=time.monotonic() + 60)
    (row,) = rows.run([tiny("fla")], suite, tmp_path / "gpu.jsonl")
    assert "fla, which this is measured beside, is not here" in row["failure"] and "pip install -e '.[parity]'" in row["failure"]
    assert (row["operator"], row["implementation"], row["pass"]) == ("linear_scan", "fla", "forward_backward")


def everything(case):
    return True


class Peer:
    """Answers as fla's process does: with our own outputs, times a constant, and two milliseconds a call."""

    def __init__(self, factor):
        self.factor, self.called = factor, []

    def call(self, function, operator, sizes, inputs, *rest, seconds):
        self.called.append(function)
        if function is fla_peer.time_operator:
            assert sizes == dataclasses.asdict(tiny().shape)
            return {"seconds": [0.002] * 3, "peak_bytes": None}
        assert operator == "linear_scan" and sizes == dataclasses.asdict(gpu.small(tiny().shape))
        assert inputs["x"][1] == "bfloat16" and inputs["decay"][1] == "float32"
        case = dataclasses.replace(tiny(), shape=gpu.small(tiny().shape))
        floating, others, cotangents = cases.arguments(case)
        cotangents["final_state"] = jnp.zeros_like(cotangents["final_state"])
        return {name: self.factor * np.asarray(a, np.float32) for name, a in cases.program(case)(floating, others, cotangents).items()}


def test_a_peer_is_held_against_our_reference():
    peer = Peer(1.0)
    assert gpu.measure(tiny("fla"), Runs(Here(), peer))["median_s"] == 0.002
    assert peer.called == [fla_peer.time_operator, fla_peer.outputs]  # it chooses block sizes at its first call
    row = gpu.measure(tiny("fla"), Runs(Here(), Peer(1.05)))
    assert "median_s" not in row and row["failure"].startswith("not measured, errors above 0.03: ") and "output 5.0e-02" in row["failure"]


def test_what_is_measured_and_in_which_order():
    found = gpu.cases([], [], ["gla_r6:340m"])
    operators, steps = [c for c in found if isinstance(c, cases.Case)], [c for c in found if isinstance(c, gpu_steps.Case)]
    assert found == operators + steps
    assert [c.shape.T for c in operators] == sorted((c.shape.T for c in operators), key=gpu.LENGTHS.index)
    assert all(c.shape.B * c.shape.T == 32768 and c.dtype == "bfloat16" for c in operators)
    of_one_length = [c.implementation for c in operators if c.shape.T == gpu.LENGTHS[0]]
    assert of_one_length.index("xla") == len(of_one_length) - of_one_length.count("xla")  # what is compared with most comes last
    ours = {c.operator for c in operators if c.implementation == "pallas"}
    assert ours == set(cases.OPERATORS)
    for shape, pass_name, T in {(c.shape_name, c.pass_name, c.shape.T) for c in operators}:
        found = {c.implementation for c in operators if (c.shape_name, c.pass_name) == (shape, pass_name)}
        assert found == {"pallas", "fla"} | ({"xla"} if T in gpu.XLA_LENGTHS else set())
    assert [(c.implementation, c.window) for c in steps] == [("ours", 2048), ("fla", 2048), ("ours", 8192), ("fla", 8192)]
    config = steps[0].run_config("none")
    assert (config.train.batch, config.train.microbatch, config.data.window, config.model.remat) == (16, 16, 2048, "none")
    assert len(gpu_steps.select(gpu_steps.CONFIGS)) == 4 * (1 + 3 * 7 + 1 + 7)


def test_the_first_round_is_of_sequences_as_the_study_has():
    every = gpu.cases([], [], [])
    found = [case for case in every if gpu.wanted_first(case)]
    steps = [case for case in found if isinstance(case, gpu_steps.Case)]
    assert {case.config for case in steps} == {"transformer:340m", *(f"{family}_r6:340m" for family in recipe.FAMILIES)}
    assert all(case.window == 2048 for case in steps) and len(steps) == 2 * 8
    assert {(case.implementation, case.shape.T) for case in found if isinstance(case, cases.Case)} == {("pallas", 2048), ("fla", 2048)}
    with_others = [one for suite in gpu.rounds(HERE, 0.0) for case in every for one in suite.cases(case)]
    assert sorted(with_others, key=str) == sorted(every, key=str) and set(with_others[: len(found)]) == set(found)


def test_packed_documents_start_where_the_shape_has_them():
    shape = dataclasses.replace(attention_shapes.SHAPES["packed_340m"], B=3, T=50, documents=7)
    documents = np.tile(attention_shapes.document_of_token(shape), shape.B)
    assert fla_peer.starts(3, 50, 7) == [*np.flatnonzero(np.diff(documents, prepend=0)), 150]


def test_a_second_call_goes_on_where_the_first_was_stopped(tmp_path, capsys):
    output, asked = tmp_path / "gpu.jsonl", [tiny(), dataclasses.replace(tiny(), pass_name="forward")]
    assert not rows.run(asked, gpu.suite(HERE, everything, until=time.monotonic() - 1), output)
    assert "the time is over: 2 are left" in capsys.readouterr().out
    assert len(rows.run(asked[:1], gpu.suite(HERE, everything, until=time.monotonic() + 60), output)) == 1
    (row,) = rows.run(asked, gpu.suite(HERE, everything, until=time.monotonic() + 60), output)
    assert row["pass"] == "forward"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2
    for other in ({"git": "another"}, {"jax": "0.1"}, {"jaxlib": "0.1"}, {"device": "another"}, {"peer_versions": {"torch": "0.1"}}):
        output.write_text("\n".join(json.dumps(line | other) for line in lines))
        assert rows.unmeasured(asked, gpu.suite(HERE, everything, 0.0), output) == asked
    output.write_text("\n".join(json.dumps(line | {"peer_versions": fla_peer.installed()}) for line in lines))
    assert not rows.unmeasured(asked, gpu.suite(HERE, everything, 0.0), output)
    output.write_text(output.read_text()[:-9])  # of a call that was killed while it wrote
    assert rows.unmeasured(asked, gpu.suite(HERE, everything, 0.0), output) == asked[1:]


def test_each_state_of_the_code_is_measured(tmp_path, monkeypatch):
    """An edit after an edit, neither committed, is another revision; results are no edit."""
    kernel, output = tmp_path / "pallas_kernels/scan.py", tmp_path / "experiments/results/gpu.jsonl"
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/revision.py").write_text("")
    git = ["git", "-C", tmp_path, "-c", "user.name=A", "-c", "user.email=a@b.c"]

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return revision(tmp_path)

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    outside = [write(kernel, "1"), write(kernel, "2"), write(kernel, "1")]
    assert outside[0] == outside[2] != outside[1] and all(name.startswith("+") and len(name) == 13 for name in outside)
    for words in (["init", "-q"], ["add", "pallas_kernels", "experiments"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert write(output, "") == head
    edits = [write(kernel, "2"), write(kernel, "3"), write(tmp_path / "pallas_kernels/new.py", "1"), write(kernel, "1")]
    assert len({head, *edits}) == 5 and all(name.startswith(f"{head}+") for name in edits)

    def measured():
        monkeypatch.setattr(rows, "provenance", lambda: {"device": "card", "jax": "1", "jaxlib": "1", "git": revision(tmp_path)})
        suite = rows.Suite("gpu", everything, lambda case: {}, {}, until=time.monotonic() + 60)
        return len(rows.run([tiny()], suite, output))

    assert (measured(), measured()) == (1, 0)
    write(kernel, "4")
    assert (measured(), measured()) == (1, 0)


def test_code_in_the_folder_of_another_project_has_not_its_revision(tmp_path):
    """As installed in a .venv there, whether or not git ignores it."""
    git = ["git", "-C", tmp_path, "-c", "user.name=A", "-c", "user.email=a@b.c"]
    (tmp_path / "site-packages/experiments").mkdir(parents=True)
    (tmp_path / "site-packages/experiments/revision.py").write_text("")
    (tmp_path / "theirs.txt").write_text("")
    for words in (["init", "-q"], ["add", "theirs.txt"], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    name = revision(tmp_path / "site-packages")
    assert name.startswith("+") and len(name) == 13


def test_a_step_of_ours(monkeypatch):
    monkeypatch.setattr(gpu_steps, "TOKENS", 256)
    monkeypatch.setattr(gpu_steps, "Process", lambda *_: Here())
    monkeypatch.setattr(gpu_steps, "peak_flops", lambda devices=8: (1e12 * devices, "data sheet"))  # of a host with eight cards
    row = gpu_steps.measure(gpu_steps.Case("ours", "hgrn_r6:tiny", 128), time.monotonic() + 300)
    assert row["tokens_per_s"] == pytest.approx(256 / row["median_s"]) and row["flops"] > 1e8
    assert row["mfu"] == pytest.approx(row["flops"] / row["median_s"] / 1e12) and row["remat"] == "none"  # a step is run on one
    assert row["loss"] == pytest.approx(np.log(256), abs=1) and row["peak_bytes"] > 1e6
    assert row["implementations"]["hgrn"] == {"linear_scan": ["xla"]}


def test_calls_are_repeated_in_batches(monkeypatch):
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(batches.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(batches, "BATCH", 2.0)  # a call takes half a second by this clock: four a batch
    monkeypatch.setattr(batches, "SECONDS", 2.0)
    made, awaited = [], []
    times = batches.batches(lambda: made.append(0) or len(made), awaited.append)
    assert times == [0.125] * 4 and len(made) == 2 + 4 * 4 and awaited == [1, 2, 6, 10, 14, 18]


class Unreadable(Exception):
    """An error that another process cannot make again."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


def fail(error):
    if error is None:
        os._exit(1)
    raise error if isinstance(error, Exception) else Unreadable("a fault", error)


def test_a_process_that_fails_hangs_or_ends(monkeypatch):
    child = process.Process("the compiler", {"EXPERIMENTS_BENCH_TEST": "told"})
    first = child.call(os.getpid)
    with pytest.raises(KeyError, match="a name"):
        child.call(fail, KeyError("a name"))
    with pytest.raises(RuntimeError, match="Unreadable: a fault at 7"):
        child.call(fail, 7)
    assert child.call(os.getpid) == first
    with pytest.raises(RuntimeError, match="the compiler ended its process"):
        child.call(fail, None)
    assert child.call(os.getenv, "EXPERIMENTS_BENCH_TEST") == "told" and "EXPERIMENTS_BENCH_TEST" not in os.environ
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="the compiler gave no answer within 0 s, and was ended"):
        child.call(time.sleep, 60, seconds=0.2)
    assert time.monotonic() - started < 20 and child.call(os.getpid) != first
    child.close()


def test_a_process_in_which_something_failed_is_used_no_more():
    """A kernel's fault may have lost the context that it has of the card."""
    ours = process.Process("our process", {})
    first = ours.call(os.getpid)
    with pytest.raises(KeyError):
        gpu._ask(ours, fail, KeyError("a name"))
    assert gpu._ask(ours, os.getpid) != first
    ours.close()


@pytest.fixture
def kernels(monkeypatch):
    """The case of one of our kernels, which is XLA's form; and what it gives a row when another program takes its place."""
    monkeypatch.setattr(gpu, "XLA_LENGTHS", (tiny().shape.T,))
    case = tiny("xla")
    values = cases.arguments(case)
    usual = jax.jit(cases.program(case)).lower(*values).compile()

    class Other:
        def __init__(self, change):
            self.change, self.calls, self.as_text = change, 0, usual.as_text

        def __call__(self, *values):
            self.calls += 1
            return self.change(self.calls, usual(*values))

    return lambda change: gpu._check_whole(dataclasses.replace(case, implementation="pallas"), Other(change), values)


def test_a_kernel_is_checked_on_all_that_is_timed(kernels):
    found = kernels(lambda call, outputs: outputs)
    assert not found["cudnn"] and "failure" not in found and set(found["errors_of_whole"].values()) == {0.0}

    def change_one(call, outputs):
        return outputs | {"final_state": outputs["final_state"].at[1, 5].add(float(call))}

    assert "two calls differ in 1.6e-02 of final_state: a race" in kernels(change_one)["failure"]
    off = kernels(lambda call, outputs: outputs | {"output": outputs["output"].at[1, 90:].set(0)})
    assert off["failure"].startswith("not measured, output is ") and off["errors_of_whole"]["final_state"] == 0
    lost = kernels(lambda call, outputs: outputs | {"output": outputs["output"].at[1, 3, 3].set(jnp.nan)})
    assert "failure" in lost


def test_any_mistake_costs_one_row(tmp_path):
    def measure(case):
        raise AssertionError("of a library's own")

    assert rows.measure("gpu", measure, tiny())["failure"] == "AssertionError: of a library's own"


def multiply(factor):
    if factor == 0:
        raise ValueError("nothing to compile")

    def multiplied(x):
        return factor * x

    return float(jax.jit(multiplied)(np.float32(7)))


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """What there is of the programs of :func:`multiply` in JAX's folder of them, and how often one was found there."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    hits = []

    def listen(event, **_):
        if event.endswith("/cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    compilation_cache.reset_cache()
    yield lambda: set((tmp_path / "hybrid_jax" / "programs").glob("jit_multiplied*-cache")), hits
    jax.monitoring.unregister_event_listener(listen)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_what_is_compiled_ahead_is_found_in_its_turn(programs, monkeypatch, capsys):
    kept, hits = programs
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    environment = ahead.keep_programs()
    ahead.rehearse(multiply, [0, 2, 3], environment, until=time.monotonic() + 600)
    assert "compiled ahead, in 2 processes" in capsys.readouterr().out
    assert len(kept()) == 2 and not hits
    assert [multiply(2), multiply(3)] == [14, 21] and len(kept()) == len(hits) == 2
    ahead.rehearse(multiply, [4, 5], environment, until=time.monotonic() - 1)  # too late
    assert len(kept()) == 2


def test_cases_with_programs_in_common_are_compiled_together(monkeypatch):
    found = gpu.of_one_shape([case for case in gpu.cases([], ["hgrn_340m"], ["gla_r6:340m"]) if isinstance(case, cases.Case)])
    assert all(len({(case.implementation, case.shape_name) for case in group}) == 1 for group in found)
    assert {tuple(case.pass_name for case in group) for group in found} == {cases.PASSES}
    assert len(found) == 2 * len(gpu.LENGTHS) + len(gpu.XLA_LENGTHS)


def test_what_is_left_to_measure_is_compiled_ahead(monkeypatch, tmp_path):
    rehearsed = []
    monkeypatch.setattr(ahead, "rehearse", lambda perform, tasks, environment, until: rehearsed.append((perform, tasks)))
    forward = dataclasses.replace(tiny(), pass_name="forward")
    suite = gpu.suite(HERE, everything, until=time.monotonic() + 60)
    rows.run([tiny()], suite, tmp_path / "gpu.jsonl")
    rows.run([tiny(), forward], suite, tmp_path / "gpu.jsonl")
    assert rehearsed == [(gpu.rehearse, [[tiny()]]), (gpu.rehearse, [[forward]])]
    gpu.rehearse([tiny(), forward])  # as a process does it
    steps = gpu_steps.suite(everything, 0.0, lambda: rehearsed.append("room is made"))
    steps.rehearse(gpu_steps.select(["hgrn_r6:tiny"]))
    ours = [gpu_steps.Case("ours", "hgrn_r6:tiny", window) for window in gpu_steps.WINDOWS]
    assert rehearsed[-2:] == ["room is made", (gpu_steps.rehearse, ours)]


def test_without_a_gpu_the_command_ends_in_one_line():
    words = [sys.executable, "-m", "experiments.bench", "--suite=gpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert (
        done.returncode == 2 and "--suite=gpu is measured on a GPU, and this machine has cpu; --target=gpu:h200 needs none" in done.stderr
    )
