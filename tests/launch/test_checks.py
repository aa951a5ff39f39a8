"""What is checked before anything is created: accelerators, the command, the code; and that quoting survives every shell."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import cli
from hybrid_jax.config import ConfigError
from launch import accelerators, code, command_flags, gcloud, job, shell
from tests.launch.stand_ins import ROOT, World


@pytest.mark.parametrize(
    "name, chips, topology, hosts",
    [  # https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e
        ("v4-8", 4, "2x2x1", 1),
        ("v4-4096", 2048, "8x16x16", 512),
        ("v5litepod-1", 1, "1x1", 1),
        ("v5litepod-8", 8, "2x4", 1),
        ("v5litepod-16", 16, "4x4", 4),
        ("v5litepod-256", 256, "16x16", 64),
        ("v5p-8", 4, "2x2x1", 1),
        ("v5p-384", 192, "4x4x12", 48),
        ("v5p-12288", 6144, "16x16x24", 1536),
        ("v6e-8", 8, "2x4", 1),
        ("v6e-256", 256, "16x16", 64),
    ],
)
def test_sizes_and_hosts(name, chips, topology, hosts):
    found = accelerators.find(name)
    assert (found.chips, found.topology, found.hosts) == (chips, topology, hosts)


def test_every_name_is_found_and_no_other():
    for on_gke in (False, True):
        for name in accelerators.names(on_gke=on_gke):
            found = accelerators.find(name, on_gke=on_gke)
            assert found.name == name and math.prod(map(int, found.topology.split("x"))) == found.chips
    for name in ("v4", "v4-", "v4-0", "v4-7", "v5p-2", "v6e-512", "v5e-256", "tpu-v5litepod-256", "TPU", "", "v5litepod-256 --spot"):
        with pytest.raises(ConfigError, match="there is no accelerator type"):
            accelerators.find(name, on_gke=True)


@pytest.mark.parametrize("zone", ["us-central2-b", "europe-west4-b", "us-south1-ai1b", "asia-northeast1-b"])
def test_zones(zone):
    accelerators.check_zone(zone)


def test_a_zone_that_is_not_listed_is_noted():
    v5e = accelerators.find("v5litepod-256")
    assert accelerators.zone_note(v5e, "us-west4-a") is None
    assert "us-west4-a" in accelerators.zone_note(v5e, "us-central2-b")


arguments = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r", exclude_categories=["Cs"])), max_size=4)


@settings(max_examples=30, deadline=None)
@given(arguments)
def test_quoting_survives_bash(words):
    """Whatever is typed arrives; tasks put their number into it."""
    words = [word.replace("{", "(") for word in words]
    for given_words, variable, expected in [
        (words, None, words),
        ([f"{word}{{task}}{word}" for word in words], "TASK", [f"{word}5{word}" for word in words]),
        ([f"{{task}}/{{tasks}}{word}" for word in words], "TASK", [f"5/64{word}" for word in words]),
    ]:
        line = job.shell_line(job.Job("train", tuple(given_words)), variable, 64)
        show = f"{sys.executable} -SEc 'import json, sys; print(json.dumps(sys.argv[1:]))'"
        text = line.replace("python", show, 1)
        output = subprocess.run(["bash", "-c", text], capture_output=True, check=True, env={"TASK": "5", "LC_ALL": "C.UTF-8"}).stdout
        assert json.loads(output) == ["-m", "experiments.train", *expected]


def test_a_line_break_is_refused():
    with pytest.raises(ConfigError, match="line break"):
        job.check(["python", "-m", "experiments.train", "--workdir=a\nb"])


# The command; its flags; what is said of them. One --help, one name, one value of each kind, and what only validators know.
WRONG = [
    ("train", ["--nonsense=1"], "experiments.train: this command has no flag --nonsense; it has --config, --coordinator, --process,"),
    ("train", ["--step=1"], "has no flag --step"),  # though others have
    ("train", ["--wordkir=x"], "did you mean --workdir?"),
    ("train", ["--help"], "told here: python -m experiments.train --help"),
    ("train", ["--workdir"], "Missing value for flag --workdir"),
    ("train", ["--workdir", "x"], "unexpected 'x'; values are given as --name=value"),
    ("eval", ["--step=abc"], "flag --step=abc"),
    ("eval", ["--tokens=0"], "0 is not a positive integer"),
    ("eval", ["--suite=nonsense"], "should be one of <completion|held_out|"),
    ("eval", ["--lengths=256,many"], "must be positive integers with commas between them"),
    ("eval", ["--config=configs/gla_r6.py"], "this command takes no --config; the configuration is read from the run's folder"),
    ("generate", ["--temperature=warm"], "flag --temperature=warm"),
    ("tokenize", ["--shard=64/64"], "give i/n, of n shards the i-th from 0"),
    ("tokenize", ["--shard={task}/{tasks}"], "give i/n"),  # where there are no tasks
]


@pytest.mark.parametrize("name, given, said", WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_flags_are_those_that_the_command_itself_takes(name, given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        job.check(["python", "-m", f"experiments.{name}", *given])


def test_flags_that_are_right_are_taken():
    checked = job.check(["python", "-m", "experiments.eval", "--workdir=gs://bucket/gla", "--suite=held_out", "--lengths=256,1024"])
    assert checked.value("workdir") == "gs://bucket/gla" and checked.value("step") is None
    job.check(["python", "-m", "experiments.tokenize", "--input=gs://bucket/*.parquet", "--shard={task}/{tasks}"], tasks=64)
    spaced = job.check(["python", "-m", "experiments.describe", "--config", "configs/gla_r6.py", "--config.train.steps", "50"])
    assert spaced.value("config") == "configs/gla_r6.py" and spaced.arguments[1] == "--config.train.steps=50"
    job.check(["python", "-m", "experiments.sweep", "--config.train.steps=50", "--eval=--suite=ruler --lengths=1024"])


def test_several_lists_of_flags_are_told_apart():
    """In one process: what one of them was given is forgotten before the next."""
    lines = ("--step=3", "--suite=mqar"), ("--step=x",), ("--suite=lm", "--step=3")
    assert [bool(said) for said in command_flags.mistakes("experiments.eval", *lines)] == [False, True, False]


def test_a_command_that_cannot_be_imported_is_refused_in_a_line():
    with pytest.raises(ConfigError, match="experiments.nothing cannot be checked, .*No module named 'experiments.nothing'$"):
        command_flags.mistakes("experiments.nothing", ())


@pytest.fixture
def checkout(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name, text in {"a.py": "1", "configs/mine.py": "2", ".gitignore": "runs/\n", "runs/x": "3", "new.py": "4"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "-C", tmp_path, "add", "a.py", "configs", ".gitignore"], check=True)
    return tmp_path


def test_code_is_what_git_tracks_as_it_is_now(checkout, tmp_path, capsys):
    (checkout / "a.py").write_text("changed")
    staged = tmp_path / "runs"  # which git ignores
    code.stage(checkout, staged, {"job.sh": "true"})
    assert (staged / "a.py").read_text() == "changed"
    assert sorted(path.name for path in staged.rglob("*") if path.is_file()) == [".gitignore", "a.py", "job.sh", "mine.py", "x"]
    code.note_left_behind(checkout)
    assert capsys.readouterr().out == "note: not copied, for git does not track them: new.py; git add what the job needs\n"
    (checkout / "a.py").unlink()
    assert Path("a.py") not in code.files(checkout)


def test_a_configuration_that_would_not_be_there_is_refused(checkout):
    code.check_config(checkout, "configs/mine.py:tiny")
    code.check_config(checkout, None)
    for given_path in ("new.py", "/etc/mine.py", str(checkout / "a.py")):
        with pytest.raises(ConfigError, match="would not be copied"):
            code.check_config(checkout, given_path)


@pytest.mark.parametrize("name", [".env", "key.pem", "my-credentials.json", "id_rsa"])
def test_secrets_are_refused(checkout, name):
    (checkout / name).write_text("secret")
    assert Path(name) not in code.files(checkout)  # untracked, it stays here
    subprocess.run(["git", "-C", checkout, "add", "-f", name], check=True)
    with pytest.raises(ConfigError, match="looks like a secret"):
        code.files(checkout)


def test_reasons_are_one_line_with_a_hint():
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: old\nERROR: (gcloud.x) PERMISSION_DENIED: no\n")
    assert shell.reason(failed).startswith("ERROR: (gcloud.x) PERMISSION_DENIED: no (your account needs roles/tpu.admin")
    assert shell.reason(subprocess.CompletedProcess([], 3, "", "")) == "exit code 3"


def test_the_stand_ins_do_check(tmp_path):
    world = World(tmp_path / "world")
    tpu = gcloud.Tpu("gla", "us-central2-b", None)
    create = tpu.create("v4-16", "tpu-ubuntu2204-base", 1, "spot")
    for wrong in ([*create, "--preemptable"], [word for word in create if "runtime" not in word], [*create, "--spot=yes"]):
        assert subprocess.run(wrong, env=world.environment(), capture_output=True).returncode == 2
    assert subprocess.run(tpu.delete(), env=world.environment(), capture_output=True).returncode == 1
    assert subprocess.run(create, env=world.environment()).returncode == 0


# ---------------------------------------------------------------- SkyPilot

FIELDS = {"name", "workdir", "resources", "envs", "setup", "run"}  # of https://docs.skypilot.co/en/latest/reference/yaml-spec.html
RESOURCES = {"infra", "accelerators", "accelerator_args", "use_spot", "job_recovery"}


def skypilot() -> dict:
    return yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())


def test_skypilot_file():
    task = skypilot()
    assert set(task) == FIELDS and set(task["resources"]) == RESOURCES
    accelerator = accelerators.find(task["resources"]["accelerators"].removeprefix("tpu-"))
    assert task["resources"]["accelerator_args"] == {"runtime_version": accelerator.generation.runtime}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [cli.STOPPED]
    assert task["resources"]["use_spot"] and task["envs"]["WORKDIR"] is None  # so that sky asks for it


@pytest.mark.parametrize("workdir, code", [("gs://bucket/gla", 0), ("runs/gla", 2)])
def test_skypilot_runs_the_trainer(tmp_path, workdir, code):
    (tmp_path / "hybrid-jax" / "bin").mkdir(parents=True)
    python = tmp_path / "hybrid-jax" / "bin" / "python"
    python.write_text(f"#!{sys.executable} -SE\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    environment = {"HOME": str(tmp_path), "CONFIG": "configs/gla_r6.py", "WORKDIR": workdir, "OVERRIDES": "--config.train.steps=3"}
    result = subprocess.run(["bash", "-c", skypilot()["run"]], env=environment, capture_output=True, text=True)
    assert result.returncode == code
    if code == 0:
        wanted = ["-m", "experiments.train", "--config=configs/gla_r6.py", "--workdir=gs://bucket/gla", "--config.train.steps=3"]
        assert json.loads(result.stdout) == wanted
    else:
        assert "would go with the machines" in result.stderr
