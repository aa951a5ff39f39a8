"""A pod that is not rented: what is refused before the compiler is loaded, what is tried in a sweep, what is said of a step."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import cli
from hybrid_jax import costs
from hybrid_jax.chips import CHIPS
from hybrid_jax.config import ConfigError
from launch import accelerators, ahead, candidates, report, topologies
from tests.launch.stand_ins import ROOT

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'")

V5E = topologies.find("v5e:2x2")


def tiny(**train):
    config = cli.load_run([f"--config={ROOT}/experiments/configs/gla_r6.py:tiny"], "").config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


@functools.cache
def found_for(batch):
    return candidates.find(tiny(batch=batch), V5E)


def command(*arguments, code=0):
    """Its lines; run as a person would, in 100 columns."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.aot", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )
    assert done.returncode == code, done.stderr
    return (done.stderr if code == 2 else done.stdout).splitlines()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "give --topology=KIND:TOPOLOGY, such as --topology=v5e:16x16 or --topology=h100:4x8 (hosts x GPUs)"),
        (("--topology=v5e:3x3",), "--topology=v5e:3x3: v5e has no 3x3 slices; it has 1x1, 2x2"),
        (("--topology=v100:8",), "there are v4, v5e, v5p, v6e, tpu7x; h200, h100"),
        (("--topology=h100:16",), "--topology=h100:8 is one host with 8, the most there are, h100:4x8 four of them"),
        (("--topology=h100:8", "--slices=2"), "--slices=2: GPUs have hosts instead; give --topology=h100:2x8"),
        (("--topology=v5e:2x2", "--mesh=rows=4"), "--mesh=rows=4: give sizes of data, fsdp, seq, tensor"),
        (("--topology=v5e:2x2", "--config.model.widht=64"), "did you mean 'width'?"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    lines = command("--config=configs/gla_r6.py:tiny", *arguments, code=2)
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


@needs_libtpu
@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--topology=v5e:2x2", "--mesh=data=3"), "mesh data 3 x fsdp -1 x seq 1 x tensor 1 does not fit 4 devices"),
        (("--topology=v5e:2x2", "--slices=2"), "mesh.data=1 cannot be dealt to 2 slices; give --config.mesh.data=2"),
        (("--topology=v5e:8x8",), "train.batch=16 cannot be dealt to data x fsdp = 1 x 64"),
        (("--topology=v5e:2x2", "--config.model.vocabulary=513", "--mesh=tensor=2"), "does not divide the 'vocabulary' axis of size 513"),
    ],
)
def test_what_cannot_be_dealt_out_is_one_line(arguments, says):
    test_mistakes_are_one_line(arguments, says)


def test_a_mesh_in_short():
    given = topologies.with_mesh(tiny(), "data=4,fsdp=-1,tensor=2").mesh
    assert (given.data, given.fsdp, given.seq, given.tensor) == (4, -1, 1, 2)
    assert topologies.with_mesh(tiny(), "tensor=2").mesh == dataclasses.replace(tiny().mesh, tensor=2)
    for wrong in ("data", "data=", "data=x", "data=4;fsdp=2", "data=4,data=2", "data=4,", "", "expert=2"):
        with pytest.raises(ConfigError, match="such as --mesh=data=4,fsdp=64"):
            topologies.with_mesh(tiny(), wrong)


def test_every_topology_that_can_be_had_is_known_and_no_other():
    for generation in accelerators.GENERATIONS:
        for chips, topology in generation.topologies.items():
            found = topologies.find(f"{generation.spoken}:{topology}", 3)
            assert (found.generation, found.chips, found.name) == (generation, 3 * chips, f"{generation.spoken}:{topology}")
    for wrong in ("v5litepod:2x2", "v5e", "v5e:", "2x2", "v5e:4x4x4", "v5p:4x4"):
        with pytest.raises(ConfigError, match=f"--topology={wrong}"):
            topologies.find(wrong)


def test_hosts_with_gpus():
    for name, hosts, cards in (("h100:8", 1, 8), ("h200:1", 1, 1), ("h100:4x8", 4, 8), ("h200:16x4", 16, 4)):
        found = topologies.find(name)
        assert (found.hosts, found.cards, found.chips, found.name, found.slices) == (hosts, cards, hosts * cards, name, 1)
        assert ahead.devices(found) == hosts * cards
    for wrong in ("h100", "h100:", "h100:0", "h100:9", "h100:8x9", "h100:2x2x2", "h100:x8"):
        with pytest.raises(ConfigError, match=f"--topology={wrong}"):
            topologies.find(wrong)


def test_memory_that_training_does_not_take_by_itself_is_told():
    row = {"effort": 0.0, "held_bytes": 0.96 * ahead.capacity(topologies.find("h100:8")), "step_s": 1.0, "mfu": 0.5}
    says = "it fits, but only with more than the 95% of a GPU's memory that training takes unless XLA_CLIENT_MEM_FRACTION is set; a step"
    assert report._verdict(row, topologies.find("h100:8")).startswith(says)
    assert report._verdict(row | {"held_bytes": 0.9 * 80e9}, topologies.find("h100:8")).startswith("it fits; a step takes 1,000.0 ms")
    assert report._verdict(row, topologies.find("v5p:2x2x1")).startswith("it fits; a step takes")


def test_what_a_device_holds_of_the_state_is_dealt_out():
    config, target = tiny(), topologies.find("v5e:4x4")
    whole = ahead.abstract_state(config, jax.sharding.AbstractMesh((1,) * 4, ahead.AXES)).state
    held = {}
    for fsdp in (1, 2, 16):
        mesh = jax.sharding.AbstractMesh((16 // fsdp, fsdp, 1, 1), ahead.AXES)
        held[fsdp] = ahead.held_state(config, mesh, whole)
    exact = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole.params))
    assert held[1]["parameters"] == exact and held[1]["optimizer"] == 2 * exact + 8  # Adam's two moments, and two counters
    assert held[1]["batch"] == 16 / 16 * 256 * 4 * 4  # tokens, targets, weights, segment ids
    for fsdp in (2, 16):
        assert exact / fsdp <= held[fsdp]["parameters"] < 1.1 * exact / fsdp  # vectors are whole on each
    assert ahead.devices(target) == 16 and ahead.devices(topologies.find("tpu7x:2x2x1", 2)) == 16


def test_the_least_time_of_a_step_and_the_models_share_of_it(monkeypatch):
    """On four chips: by what is computed there, the model's own FLOPs at least; by what is moved; and MFU by the model's own."""
    config, chip = tiny(batch=16), CHIPS[V5E.kind]
    chips = [SimpleNamespace(platform="tpu", coords=(i % 2, i // 2, 0)) for i in range(4)]
    mesh = SimpleNamespace(size=4, shape={"data": 1, "fsdp": 4, "seq": 1, "tensor": 1}, devices=np.array(chips))
    text = jax.jit(lambda x: x @ x).lower(np.ones((8, 8), np.float32)).compile().as_text()
    state = {"parameters": 1000, "optimizer": 2000, "batch": 50}
    own = 3 * 16 * 256 * costs.flops_per_token(config.model, 256) / 4
    for computed, least in ((2 * own, 2 * own), (own / 2, own)):  # recomputed, or in a kernel whose FLOPs are not known
        monkeypatch.setattr(ahead, "flops", lambda *_, computed=computed: computed)
        row = ahead._work(config, V5E, mesh, text, ahead.QUICK, state)
        assert row["seconds"] == pytest.approx({"FLOPs": least / chip.flop_per_s, "HBM": 6050 / chip.bytes_per_s})
        assert (row["flops"], row["model_flops"], row["hbm_bytes"]) == (computed, pytest.approx(own), 6050)  # state is read and written
        assert row["step_s"] == max(row["seconds"].values())
        assert row["mfu"] == pytest.approx(own / least)


def test_a_sweep_tries_what_can_be_dealt_out():
    config, target, found = tiny(), V5E, found_for(16)
    meshes = {(one.mesh.data, one.mesh.fsdp, one.mesh.tensor) for one in found.likely}
    assert meshes == {(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)}
    assert found.impossible == 0 and not found.too_large
    assert found_for(2).impossible == 3  # with four parts of the batch
    for one in found.likely:
        rows = 16 // (one.mesh.data * one.mesh.fsdp)
        assert rows % one.config.train.microbatch == 0
        assert (
            dataclasses.replace(one.config, mesh=config.mesh, model=config.model, train=config.train) == config
        )  # nothing else is changed
    for mesh in {one.mesh: one for one in found.likely}.values():
        assert ahead.check(mesh.config, target)["fsdp"] == mesh.mesh.fsdp
    assert [one.guess_s for one in found.likely] == sorted(one.guess_s for one in found.likely)
    assert len({(one.mesh, one.config.model.remat, one.config.train.microbatch) for one in found.likely}) == len(found.likely)


def test_what_surely_holds_more_is_known():
    found = found_for(16).likely

    def one(remat, microbatch):
        alike = [c for c in found if (c.config.model.remat, c.config.train.microbatch) == (remat, microbatch)]
        return next(c for c in alike if (c.mesh.data, c.mesh.fsdp) == (1, 4))

    assert one("none", 2).holds_more(one("operators", 2)) and one("block", 4).holds_more(one("block", 2))
    assert not one("block", 2).holds_more(one("block", 2)) and not one("block", 4).holds_more(one("none", 2))


def test_what_cannot_fit_is_not_compiled(capsys):
    config = cli.load_run([f"--config={ROOT}/experiments/configs/gla_r6.py:1b3", "--config.train.batch=16"], "").config
    found, target = candidates.find(config, V5E), V5E
    assert min(one.known_bytes for one in found.likely) > 1.3e9 * 12 / 4  # float32 parameters and two moments over four chips
    assert max(one.known_bytes for one in found.likely) <= 16 * 2**30 < min(one.known_bytes for one in found.too_large)
    assert {one.mesh.fsdp * one.mesh.tensor for one in found.too_large} >= {1}
    report.announce(found, target, 5)
    assert "at most 5 of the other" in capsys.readouterr().out


def rows_of(fitting):
    """A stand-in for the compiler: what ``fitting(case)`` says fits takes as long as its microbatch says."""

    def measure(case):
        row = case.identity | {"effort": ahead.QUICK, "compile_s": 1.0, "held_bytes": 1e9}
        if not fitting(case):
            return row | {"no_room": [20e9, 16e9]}
        seconds = 1 / case.config.train.microbatch
        return row | {"seconds": {"FLOPs": seconds}, "step_s": seconds, "mfu": 0.5}

    return measure


def test_a_sweep_ranks_and_leaves_out_what_holds_more(capsys):
    found, target = found_for(16), V5E
    compiled = []

    def fitting(case):
        compiled.append((case.identity["mesh"]["fsdp"], case.config.model.remat, case.config.train.microbatch))
        return case.config.train.microbatch < 4

    assert report.sweep("tiny", found, target, 1000, rows_of(fitting)) == 0
    shown = capsys.readouterr().out
    assert len(compiled) < len(found.likely) and f"left out: {len(found.likely) - len(compiled)} that hold more" in shown
    table = [line.split() for line in shown.splitlines() if line.startswith("│")]
    assert [line for line in table if "FLOPs" in line] and table.index(table[0]) == 0
    assert "does not fit" in shown and shown.index("FLOPs") < shown.index("does not fit")
    assert report.sweep("tiny", found, target, 2, rows_of(lambda case: False)) == 1
    assert "NONE OF THEM FITS" in capsys.readouterr().out


@needs_libtpu
@pytest.mark.slow
def test_a_tiny_step_on_two_slices(tmp_path):
    output = tmp_path / "rows.jsonl"
    small = ("--config.model.layers=2", "--config.model.ratio=2", "--config.data.window=128")
    lines = command("--config=configs/gla_r6.py:tiny", "--topology=v5e:2x2", "--slices=2", "--mesh=data=2", *small, f"--output={output}")
    assert max(map(len, lines)) <= 200 and "it fits; a step takes" in lines[-1] and "least effort" in lines[-2]
    (row,) = map(json.loads, output.read_text().splitlines())
    assert (row["suite"], row["topology"], row["slices"], row["device"]) == ("aot", "v5e:2x2", 2, "TPU v5 lite")
    assert row["mesh"] == {"data": 2, "fsdp": 4, "seq": 1, "tensor": 1} and row["libtpu"] and "git" in row
    assert row["held_bytes"] == sum(row["held"].values()) > 3 * row["held"]["parameters"] > 0
    assert row["implementations"]["gla"] == {"gated_linear_attention": ["pallas"]}
    crossed = {tuple(found["axes"]) for found in row["collectives"]}
    assert ("fsdp",) in crossed and any("data" in axes for axes in crossed)
    assert any("between slices" in name for name in row["seconds"])
    assert row["step_s"] == max(row["seconds"].values()) and 0 < row["mfu"] < 1 and row["unknown_loops"] == 0
    assert row["flops"] > row["model_flops"] / 2  # the kernels and products of which the model's own FLOPs are most


@pytest.mark.parametrize(
    "message, sizes",
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.25G of 15.75G hbm.",
            (21.25 * 2**30, 15.75 * 2**30),
        ),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (84.77G) exceeds available HBM (15.75G).",
            (84.77 * 2**30, 15.75 * 2**30),
        ),
        ("INTERNAL: Mosaic failed to compile TPU kernel: Ran out of memory in memory space vmem. Used 18.00M of 16.00M vmem.", None),
    ],
)
def test_what_the_compiler_says_where_there_is_no_room(message, sizes):
    assert ahead.no_room(message) == sizes


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_is_told(tmp_path):
    small = ("--config.model.layers=1", "--config.model.ratio=None", "--config.data.window=4096", "--config.model.dtype=bfloat16")
    batch = ("--config.train.batch=8192", "--config.train.microbatch=8192")
    arguments = ("--topology=v5e:2x2", *small, *batch, f"--output={tmp_path / 'rows.jsonl'}")
    lines = command("--config=configs/gla_pure.py:tiny", *arguments, code=1)
    assert lines[-1].startswith("IT DOES NOT FIT: a device needs ")
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    needed, room = row["no_room"]
    assert needed > room > 15 * 2**30 and "step_s" not in row
