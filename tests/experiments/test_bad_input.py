"""Every mistake gets one clear line that names the cause and the remedy, before time or data is lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import pytest

from experiments import cli, train
from experiments import eval as evaluation
from hybrid_jax.data.build import build_store
from hybrid_jax.train.workdir import saved_steps
from tests.experiments.commands import CONFIG, Result, run, run_train

TINY = "--config=configs/gla_r6.py:tiny"
ROOT = Path(__file__).parents[2]


def check(result, code, *patterns):
    """One line on stderr, nothing else, that says all of ``patterns``."""
    assert result.code == code, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for pattern in patterns:
        assert re.search(pattern, lines[0]), (pattern, lines[0])


COMMAND_LINE = {
    "no config": ([], ["give one --config=configs/NAME.py"]),
    "unknown config file": (["--config=configs/gla_r66.py"], ["no configuration file 'configs/gla_r66.py'", "did you mean .*gla_r6.py"]),
    "config without its folder": (["--config=gla_r6:tiny"], ["did you mean configs/gla_r6.py"]),
    "unknown config, nothing close": (["--config=configs/zzzzzz.py"], ["there are .*configs/transformer.py"]),
    "unknown size": (["--config=configs/gla_r6.py:small"], ["size 'small' is unknown; choose one of tiny, recall, 340m, 1b3"]),
    "unknown field": ([TINY, "--config.train.step=10"], ["config.train has no field 'step'", "did you mean 'steps'"]),
    "unknown group": ([TINY, "--config.trian.steps=10"], ["config has no field 'trian'", "did you mean 'train'"]),
    "a group as a value": ([TINY, "--config.train=10"], ["config.train is a group of fields", "--config.train.steps"]),
    "a field of a value": ([TINY, "--config.train.steps.n=10"], ["config.train.steps is a single value"]),
    "field without value": ([TINY, "--config.train.steps"], ["--config.train.steps has no value"]),
    "value after a space": ([TINY, "--config.train.steps=3", "10"], ["unexpected '10'", "--name=value"]),
    "a workdir in other storage": ([TINY, "--workdir=s3://runs/gla"], ["s3://runs/gla cannot hold a run", "gs://BUCKET/FOLDER"]),
    "unknown flag": ([TINY, "--wordkir=x"], ["no flag --wordkir; did you mean --workdir?"]),
    "text for a number": ([TINY, "--config.train.steps=many"], ["config.train.steps='many' must be of type int"]),
    "fraction for an integer": ([TINY, "--config.train.steps=1.5"], ["config.train.steps=1.5 must be of type int"]),
    "number for a truth": ([TINY, "--config.log.tensorboard=3"], ["config.log.tensorboard=3 must be of type bool"]),
    "number that is none": ([TINY, "--config.optimizer.learning_rate=None"], ["config.optimizer.learning_rate=None must be of type float"]),
    "unknown choice": ([TINY, "--config.optimizer.name=sgd"], ["config.optimizer.name='sgd' must be one of 'adamw', 'muon'"]),
    "ratio that does not divide": ([TINY, "--config.model.ratio=4"], ["ratio=4 does not divide layers=6", r"choose one of \[2, 3, 6\]"]),
    "ratio of nothing": ([TINY, "--config.model.ratio=0"], ["ratio=0 must be at least 1"]),
    "head count that does not divide": ([TINY, "--config.model.mixer.heads=3"], ["gla heads=3 must divide width"]),
    "attention heads that do not divide": ([TINY, "--config.model.attention.heads=3"], ["attention heads=3 must divide model.width=128"]),
    "width that does not divide": ([TINY, "--config.model.width=130"], ["heads=2|heads=4", "must divide", "130"]),
    "one step to trace": ([TINY, "--config.log.profile_steps=5"], [r"log.profile_steps=\(5,\) must be the first and the last step"]),
    "no step to trace": ([TINY, "--config.log.profile_steps=(5,4)"], [r"log.profile_steps=\(5, 4\) must be the first and the last step"]),
    "a trace beyond the end": ([TINY, "--config.log.profile_steps=(5,900)"], [r"profile_steps=\(5, 900\) must not be beyond train.steps="]),
    "no steps": ([TINY, "--config.train.steps=0"], ["train.steps=0 must be at least 1"]),
    "negative rate": ([TINY, "--config.optimizer.learning_rate=-1"], ["learning_rate=-1.0 must be positive"]),
}


CONFIG_FILES = {
    "an exception": ("import math\n\n\ndef get_config():\n    return math.sqrt(-1)\n", ["mine.py, line 5: ValueError: .*"]),
    "in what it calls": ("import json\n\njson.loads('{')\n", ["mine.py, line 3: JSONDecodeError: Expecting property name"]),
    "a missing module": ("import no_such_module\n", ["mine.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"]),
    "not Python": ("x = 1\ndef get_config(:\n    pass\n", ["mine.py, line 2: SyntaxError: invalid syntax"]),
    "a wrong field": (
        "from hybrid_jax.config import RunConfig, TrainConfig\n\n\ndef get_config():\n    return RunConfig(train=TrainConfig(steps=0))\n",
        ["^error: train.steps=0 must be at least 1"],
    ),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_configuration_file_that_fails(case, tmp_path):
    text, patterns = CONFIG_FILES[case]
    (tmp_path / "mine.py").write_text(text)
    check(run(train.main, f"--config={tmp_path / 'mine.py'}"), 2, *patterns)


def test_values_of_the_configuration_after_a_space():
    words = ["train", "--config", "configs/gla_r6.py:tiny", "--config.train.steps", "7", "--config.mesh.fsdp", "-1"]
    given = cli.parse(words, "", cli.CONFIG_HELP)
    assert given == [TINY, "--config.train.steps=7", "--config.mesh.fsdp=-1"]
    run = cli.load_run(given)
    assert (run.name, run.config.train.steps) == ("gla_r6-tiny", 7)
    assert cli.joined(["--config", "--config.train.steps"]) == ["--config", "--config.train.steps"]  # have none


@pytest.mark.parametrize("case", COMMAND_LINE)
def test_command_line(case, tmp_path, monkeypatch):
    arguments, patterns = COMMAND_LINE[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "hybrid_jax.sharding", None)  # known before anything of JAX is imported
    check(run(train.main, *arguments), 2, *patterns)
    assert not list(tmp_path.iterdir())


def a_file(folder: Path) -> str:
    (folder / "store").write_text("text")
    return "store"


def an_empty_folder(folder: Path) -> str:
    (folder / "store").mkdir()
    return "store"


def another_folder(folder: Path) -> str:
    (folder / an_empty_folder(folder) / "notes.txt").write_text("text")
    return "store"


def a_store(folder: Path) -> str:
    (folder / "text").mkdir()
    for n in range(40):
        (folder / "text" / f"{n}.txt").write_text(f"document {n}, " * 20)
    build_store([str(folder / "text")], folder / "store", validation_fraction=0.3)
    return "store"


def a_half_written_store(folder: Path) -> str:
    manifest = folder / a_store(folder) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    return "store"


def a_store_cut_short(folder: Path) -> str:
    shutil.rmtree(folder / a_store(folder) / "train" / "tokens" / "c")
    return "store"


STORES = {
    "missing": (lambda _: "store", [], ["no token store at store: the folder does not exist", "experiments.tokenize"]),
    "a file": (a_file, [], ["is a file, not a token store"]),
    "empty": (an_empty_folder, [], ["token store store is empty", "experiments.tokenize"]),
    "something else": (another_folder, [], ["is not a token store", "experiments.tokenize"]),
    "half-written": (a_half_written_store, [], ["half-written", "run the same experiments.tokenize command again"]),
    "cut short": (a_store_cut_short, [], ["of its 1 shard", "copy the store again"]),
    "vocabulary too large": (a_store, ["--config.model.vocabulary=200"], ["vocabulary of 257, the model has 200", "at least 257"]),
    "window longer than the text": (a_store, ["--config.data.window=1000000"], ["window of 1000000", "shorter"]),
}


@pytest.mark.parametrize("case", STORES)
def test_token_store(case, tmp_path, monkeypatch):
    make, arguments, patterns = STORES[case]
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path)
    check(run_train("run", f"--config.data.source={source}", *arguments), 2, *patterns)
    assert not (tmp_path / "run").exists()


MACHINE = {
    "no accelerator": (["--config.platform=tpu"], ["config.platform='tpu' was asked for", "finds only 'cpu'", "--config.platform=any"]),
    "batch on the mesh": (["--config.train.batch=12", "--config.mesh.fsdp=8"], ["train.batch=12 .* 8 devices", "choose a multiple of 8"]),
    "microbatch": (["--config.train.batch=24", "--config.mesh.fsdp=8"], ["train.microbatch=2 does not divide the 3", "train.microbatch=1"]),
    "window on the mesh": (
        ["--config.data.window=33", "--config.mesh.seq=2", "--config.mesh.fsdp=4"],
        ["data.window=33 .* mesh.seq=2 equal parts", "multiple of 2"],
    ),
    "mesh of another machine": (["--config.mesh.fsdp=3"], ["does not fit 8 devices", "must multiply to 8"]),
    "width on the mesh": (
        ["--config.mesh.fsdp=8", "--config.model.width=36", "--config.train.batch=8", "--config.train.microbatch=1"],
        ["fsdp=8 does not divide the 'embed' axis of size 36", "--config.mesh.data=-1 --config.mesh.fsdp=1"],
    ),
    "two open axes": (["--config.mesh.data=-1"], ["only one axis can be -1"]),
    "parameters on the mesh": (["--config.mesh.tensor=8", "--config.model.mlp_width=20"], ["tensor=8 does not divide", "20"]),
    "weights and biases missing": (["--config.train.batch=8", "--config.log.wandb_project=x"], ["Biases is not installed", "pip install"]),
}


@pytest.mark.parametrize("case", MACHINE)
def test_machine(case, tmp_path, monkeypatch):
    arguments, patterns = MACHINE[case]
    monkeypatch.setitem(sys.modules, "wandb", None)
    check(run_train(tmp_path / "run", *arguments, devices=None), 2, *patterns)
    assert not (tmp_path / "run").exists()


def test_too_little_memory(tmp_path, monkeypatch):
    def compile_step(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 211434595920 bytes.\n\nat:\n" + "x" * 1000)

    monkeypatch.setattr("hybrid_jax.train.step.compile_step", compile_step)
    check(run_train(tmp_path), 1, "out of memory: .*a smaller --config.train.microbatch", "allocating 211434595920 bytes")


def test_a_full_disk_is_seen_before_the_run_starts(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**4))
    check(run_train(tmp_path / "run"), 2, "checkpoints need", "make room", "--config.checkpoint.keep")


def test_a_disk_that_fills_up_ends_the_run_with_its_checkpoint_whole(tmp_path, finished, monkeypatch):
    workdir = again_from(finished, tmp_path, step=4)
    full = OSError(28, "No space left on device", str(workdir / "metrics.jsonl"))

    def write(*_):
        raise full

    monkeypatch.setattr("hybrid_jax.train.metrics.Metrics.write", write)
    check(run_train(workdir), 1, "no space left for .*metrics.jsonl", "make room and run the same command again")
    assert saved_steps(workdir) == [4]
    monkeypatch.undo()
    assert run_train(workdir).code == 0


# ---------------------------------------------------------------- a workdir


def again_from(finished: Path, folder: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after the checkpoint of ``step``."""
    workdir = folder / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    for later in saved_steps(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    return workdir


def test_a_workdir_of_another_run(finished):
    before = (finished / "config.json").read_text()
    result = run_train(finished, "--config.train.batch=8", "--config.model.width=32")
    check(result, 2, "holds a run of another configuration", "model.width: 16 -> 32; train.batch: 4 -> 8", "another --workdir")
    assert (finished / "config.json").read_text() == before


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    check(run_train(tmp_path / "file" / "run"), 2, "cannot write to", "another --workdir")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "no metadata"])
def test_an_unreadable_newest_checkpoint_falls_back_to_the_one_before(finished, tmp_path, damage):
    workdir = again_from(finished, tmp_path, step=8)
    newest = workdir / "checkpoints" / "8"
    for file in newest.rglob("_METADATA" if damage == "no metadata" else "d/*"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    result = run_train(workdir)
    assert result.code == 0 and result.err == ""
    told = [line for line in result.out.splitlines() if "cannot be read" in line]
    assert len(told) == 1 and "step 8" in told[0] and "goes on from step 4" in told[0]
    assert saved_steps(workdir) == [4, 8]


def test_no_readable_checkpoint_at_all(finished, tmp_path):
    workdir = again_from(finished, tmp_path, step=8)
    for file in (workdir / "checkpoints").rglob("d/*"):
        file.write_bytes(b"")
    check(run_train(workdir), 1, "no checkpoint in .* can be read", "another --workdir")


EVAL = {
    "no workdir": ([], ["give the --workdir"]),
    "no run": (["--workdir=nowhere"], ["nowhere holds no run"]),
    "no such step": (["--workdir={run}", "--step=5"], ["no checkpoint of step 5; it has 4, 8"]),
    "a config": (["--workdir={run}", CONFIG], ["takes no --config"]),
    "tokens": (["--workdir={run}", "--tokens=0"], ["tokens=0"]),
}


@pytest.mark.parametrize("case", EVAL)
def test_evaluation(case, finished):
    arguments, patterns = EVAL[case]
    check(run(evaluation.main, *(argument.format(run=finished) for argument in arguments)), 2, *patterns)


# ---------------------------------------------------------------- help


HELP = {  # a command, flags that its help names, and flags of other commands
    "train": (["config", "workdir", "coordinator"], ["step", "suite"]),
    "eval": (["workdir", "step", "suite", "lengths", "files", "processes"], ["config", "prompt"]),
    "generate": (["workdir", "step", "prompt", "top_p"], ["config", "coordinator", "suite"]),
    "convert": (["workdir", "step", "from_hf"], ["config", "process"]),
    "describe": (["config", "workdir", "context"], ["step", "process"]),
    "report": (["runs", "output"], ["workdir", "step", "process"]),
    "sweep": (["config", "models", "seeds"], ["workdir", "step", "process"]),
    "tokenize": (["input", "output", "shard"], ["workdir", "step", "process"]),
    "bench": (["suite", "target", "shapes"], ["workdir", "config", "step", "process"]),
}


@pytest.mark.parametrize("name", HELP)
def test_help_names_what_the_command_takes_and_nothing_else(name):
    taken, others = HELP[name]
    done = subprocess.run([sys.executable, "-m", f"experiments.{name}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    shown = set(re.findall(r"^  --(?:\[no\])?(\w+):", done.stdout, re.M))
    assert set(taken) <= shown and not shown & set(others), shown


REFUSED = [  # a command, a flag that it does not have, and what is said
    ("experiments.train", "steps", "no flag --steps; it has --config, .*; fields .* --config.train.steps="),
    ("experiments.train", "step", "no flag --step; it has --config, "),  # it goes on from the newest checkpoint, whatever is asked
    ("experiments.eval", "length", "no flag --length; did you mean --lengths"),
    ("experiments.generate", "promt", "no flag --promt; did you mean --prompt"),
    ("experiments.tokenize", "out", "no flag --out; did you mean --output"),
    ("experiments.convert", "from", "no flag --from; did you mean --from_hf"),
    ("experiments.describe", "processes", "no flag --processes; it has --config, "),
    ("experiments.sweep", "workdir", "no flag --workdir; it has "),  # each of its runs has a folder of its own
    ("experiments.report", "workdir", "no flag --workdir; it has "),
    ("experiments.bench", "operator", "no flag --operator; did you mean --operators"),
    ("launch.aot", "mash", "no flag --mash; did you mean --mesh"),
]


def without_jax(module: str, *words: str) -> Result:
    """A command, as where neither JAX nor libtpu is installed; in a process of its own, as this one knows the flags of all commands."""
    program = f"""
import runpy, sys
sys.modules.update(jax=None, libtpu=None)
sys.argv = {[module, *words]!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(("module", "flag", "said"), REFUSED, ids=[f"{module} --{flag}" for module, flag, _ in REFUSED])
def test_a_flag_that_the_command_does_not_have_is_told_before_jax_is_imported(module, flag, said, tmp_path):
    check(without_jax(module, f"--{flag}={tmp_path}/run"), 2, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["launch.aot", TINY, "--topology=v5e:2x2"], ["experiments.bench", "--target=tpu:v6e"]])
def test_a_missing_compiler_is_told_before_jax_is_imported(words):
    check(without_jax(*words), 2, "needs the TPU compiler, libtpu: pip install -e '.\\[tpu\\]'")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR])
def test_a_path_that_cannot_be_used_is_named(code, capsys):
    def action():
        raise OSError(code, os.strerror(code), "runs/there")

    check(Result(cli.guarded(action), "", capsys.readouterr().err), 2, rf"runs/there cannot be used \({os.strerror(code)}\)")


def test_other_errors_of_the_system_are_not_hidden():
    with pytest.raises(FileNotFoundError):
        cli.guarded(lambda: Path("nowhere").read_text())


def test_ctrl_c_before_a_run_has_begun_is_one_line(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybrid_jax.train.advice.check_platform", interrupted)
    result = run_train(tmp_path)
    assert (result.code, result.err) == (130, "stopped by Ctrl-C\n")


def test_a_reader_that_has_gone_is_no_mistake():
    """As `--help | head`: no word, and the exit code of a program that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "experiments.train", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_told_of():
    def action():
        raise BrokenPipeError(errno.EPIPE, "of a socket")

    with pytest.raises(BrokenPipeError):
        cli.guarded(action)
