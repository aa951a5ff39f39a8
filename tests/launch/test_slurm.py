"""The batch script: what SLURM is asked for, and what it does when it is signalled, with stand-ins for SLURM's commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import slurm
from tests.launch.stand_ins import World

TRAIN = ["--", "python", "-m", "experiments.train", "--config=configs/gla_r6.py:tiny", "--workdir=/shared/gla"]
SPECIAL = '--config.data.source=/it\'s "a" $HOME; `x` \\ store'
BASE = ["--name=gla", "--nodes=4", "--gpus_per_node=8", "--time=24:00:00"]
ARRAY = ["--name=tokens", "--time=240", "--array=64"]
TOKENIZE = ["--", "python", "-m", "experiments.tokenize", "--input=/shared/*.parquet", "--output=/shared/tokens"]


@pytest.fixture
def world(tmp_path):
    return lambda **scenario: World(tmp_path / "world", **scenario)


def submitted(world, *arguments) -> str:
    result = world.run("launch.slurm", *arguments)
    assert result.returncode == 0, result.stderr
    assert "job 4711 is queued" in result.stdout and "scancel 4711" in result.stdout
    return (world.folder / "sbatch.stdin").read_text()


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.M))


def test_a_process_a_gpu_and_a_signal_before_the_end(world):
    asked = options(submitted(world(), *BASE, "--partition=gpu", "--account=lab", "--cpus=12", *TRAIN))
    assert asked == {
        **{"job-name": "gla", "time": "24:00:00", "partition": "gpu", "account": "lab", "nodes": "4", "ntasks-per-node": "8"},
        **{"gpus-per-node": "8", "cpus-per-task": "12", "output": "gla-%j.log", "open-mode": "append", "requeue": ""},
        "signal": "B:USR1@600",
    }


def test_dry_run(world):
    world = world()
    result = world.run("launch.slurm", *BASE, "--dry_run", *TRAIN)
    assert result.returncode == 0 and world.calls() == []
    assert result.stdout.startswith("sbatch --parsable <<'END'\n#!/bin/bash\n#SBATCH --job-name=gla\n") and result.stdout.endswith("END\n")


class Cluster:
    """Runs a batch script as SLURM does: srun starts one process, scancel signals it, and nothing but scontrol queues again."""

    def __init__(self, folder: Path, script: str, act: str):
        self.folder = folder
        (folder / "cluster").mkdir()
        commands = {
            "srun": 'while [[ $1 == --* ]]; do shift; done\n"$@" & echo $! > "$FOLDER/child"; wait $!',
            # Slow, so that the process has ended before the batch script waits for it again.
            "scancel": '[[ $1 == --signal=TERM && $2 == "$ITSELF" ]] && kill -TERM "$(cat "$FOLDER/child")"; sleep 0.5',
            "scontrol": 'echo "$@" > "$FOLDER/scontrol"',
        }
        for name, text in commands.items():
            self._write(name, f"#!/bin/bash\n{text}\n")
        # The trainer: says what it was given; when asked to stop it saves and exits with 143.
        acts = {"finish": "sys.exit(0)", "fail": "sys.exit(3)", "train": "time.sleep(20); sys.exit(9)"}
        self._write(
            "python",
            f"#!{sys.executable} -SE\nimport json, os, signal, sys, time\nfolder = os.environ['FOLDER']\n"
            "def save(*_):\n    open(folder + '/saved', 'w').close(); sys.exit(143)\n"
            "signal.signal(signal.SIGTERM, save)\n"
            "with open(folder + '/arguments', 'w') as file:\n    json.dump(sys.argv[1:], file)\n"
            f"os.rename(folder + '/arguments', folder + '/given')\n{acts[act]}\n",
        )
        # The launcher's own Python comes first on the script's PATH; here it is the one that acts.
        script = script.replace(f"export PATH={os.path.dirname(sys.executable)}", f"export PATH={folder / 'cluster'}")
        self.itself = "4711_5" if "--array" in script else "4711"  # the number alone would be that of all tasks
        environment = {"PATH": "/usr/bin:/bin", "FOLDER": str(folder), "ITSELF": self.itself, "SLURM_JOB_ID": "4711"}
        if "--array" in script:
            environment |= {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "5"}
        self.process = subprocess.Popen(["bash", "-c", script], env=environment, cwd=folder)

    def _write(self, name: str, text: str) -> None:
        (self.folder / "cluster" / name).write_text(text)
        (self.folder / "cluster" / name).chmod(0o755)

    def given(self) -> list[str]:
        for _ in range(200):
            if (self.folder / "given").exists():
                return json.loads((self.folder / "given").read_text())
            time.sleep(0.05)
        raise AssertionError("nothing was started")

    def requeued(self) -> str | None:
        file = self.folder / "scontrol"
        return file.read_text().strip() if file.exists() else None


@pytest.mark.parametrize("act, code", [("finish", 0), ("fail", 3)])
def test_a_job_that_ends_is_not_queued_again(world, tmp_path, act, code):
    cluster = Cluster(tmp_path, submitted(world(), *BASE, *TRAIN, SPECIAL), act)
    assert cluster.process.wait(30) == code and cluster.requeued() is None
    assert cluster.given() == [*TRAIN[2:], SPECIAL]


@pytest.mark.parametrize("asked", [[*BASE, *TRAIN], [*ARRAY, *TOKENIZE, "--shard={task}/{tasks}"]], ids=["job", "array"])
def test_the_signal_saves_and_queues_again(world, tmp_path, asked):
    cluster = Cluster(tmp_path, submitted(world(), *asked), "train")
    cluster.given()
    cluster.process.send_signal(signal.SIGUSR1)
    assert cluster.process.wait(15) == 143
    assert (tmp_path / "saved").exists() and cluster.requeued() == f"requeue {cluster.itself}"


def test_an_array_gives_each_task_its_part(world, tmp_path):
    script = submitted(world(), *ARRAY, *TOKENIZE, "--text_field=a {task} b", "--document_end={task}/{tasks}")
    assert options(script)["array"] == "0-63" and options(script)["output"] == "tokens-%A_%a.log" and "gpus-per-node" not in options(script)
    cluster = Cluster(tmp_path, script, "finish")
    assert cluster.process.wait(30) == 0
    assert cluster.given() == [*TOKENIZE[2:], "--text_field=a 5 b", "--document_end=5/64"]


REFUSED = [
    (["--time=24:00:00"], TRAIN, "give --name"),
    (["--name=gla"], TRAIN, "give --time"),
    (["--name=a b", "--time=24:00:00"], TRAIN, "--name=a b"),
    (["--name=gla", "--time=a day"], TRAIN, "is not a time that SLURM reads"),
    (["--name=gla", "--time=10"], TRAIN, "is too short"),
    ([*BASE, "--array=0"], TRAIN, "at least one task"),
    ([*BASE, "--array=8"], TRAIN, "all 8 tasks would do the same"),
    ([*BASE, "--partition=a b"], TRAIN, "--partition='a b'"),
    (BASE, TRAIN[:-1], "--workdir on a file system that all nodes see"),
    (BASE, [*TRAIN, "--config.train.stesp=3"], "did you mean 'steps'?"),
    (BASE, [], "give the command to start after --"),
    ([*BASE, "--nodes=0"], TRAIN, "nodes"),
]


@pytest.mark.parametrize("own, command, said", REFUSED, ids=range(len(REFUSED)))
def test_refused_before_anything_is_queued(world, own, command, said):
    world = world()
    result = world.run("launch.slurm", *own, *command)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert world.calls() == []


def test_sbatch_is_missing_or_refuses(world):
    world = world(sbatch_error="Batch job submission failed: Invalid account")
    result = world.run("launch.slurm", *BASE, *TRAIN)
    assert result.returncode == 1 and "sbatch did not take the job: sbatch: error: Batch job submission failed" in result.stderr
    world.remove("sbatch")
    result = world.run("launch.slurm", *BASE, *TRAIN)
    assert result.returncode == 2 and "sbatch is not on PATH" in result.stderr
    shown = world.run("launch.slurm", "--dry_run", *BASE, *TRAIN)  # runs nothing, and so needs nothing
    assert shown.returncode == 0 and "sbatch --parsable <<" in shown.stdout


def test_times():
    times = {"90": 5400, "90:30": 5430, "1:00:00": 3600, "2-0": 172800, "1-12:30": 131400, "1-00:00:01": 86401}
    assert {time: slurm.seconds(time) for time in times} == times
