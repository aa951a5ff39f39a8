"""Arrays of tasks on Cloud Batch and on GKE: what a task runs is run here, from the archive that was copied."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hybrid_jax.data.sources import make_sources
from tests.hybrid_jax.data_samples import documents_of
from tests.launch.stand_ins import World

TOKENIZE = ["--", "python", "-m", "experiments.tokenize", "--input=gs://bucket/*.parquet", "--output=gs://bucket/tokens"]
PART = '--text_field={task}/{tasks} it\'s "a" $HOME'


def on_batch(world):
    """The shell command of a task that Cloud Batch was given."""
    (group,) = json.loads((world.folder / "gcloud.stdin").read_text())["taskGroups"]
    container = group["taskSpec"]["runnables"][0]["container"]
    return [container["entrypoint"], *container["commands"]]


def on_gke(world):
    """That of a JobSet's pod."""
    (tasks,) = json.loads((world.folder / "jobset.json").read_text())["spec"]["replicatedJobs"]
    return tasks["template"]["spec"]["template"]["spec"]["containers"][0]["command"]


LAUNCHERS = pytest.mark.parametrize(
    "launcher, place, number, task",
    [
        ("launch.cloud_batch", "--location=us-central1", "BATCH_TASK_INDEX", on_batch),
        ("launch.jobset", "--context=gke_p_us-central1_pods", "JOB_COMPLETION_INDEX", on_gke),
    ],
    ids=["batch", "jobset"],
)


def run(world, command, work, environment):
    """A task's command, with a folder of this machine for the container's own and for the bucket that it mounts."""
    *bash, script = command
    assert bash == ["/bin/bash", "-c"]
    here = script.replace("/mnt/disks/code", str(world.folder)).replace("/work", str(work))
    return subprocess.run([*bash, here], env=environment | {"WORLD": str(world.folder)}, capture_output=True, text=True, timeout=60)


@LAUNCHERS
def test_a_task(launcher, place, number, task, tmp_path):
    world = World(tmp_path / "world")
    result = world.run(launcher, "--name=tokens", place, "--tasks=64", "--code=gs://bucket/code", *TOKENIZE, PART)
    assert result.returncode == 0, result.stderr
    world.write(world.folder / "host_bin" / "pip", "assert sys.argv[-1] == '.' and Path('setup.cfg').is_file()")
    world.write(world.folder / "host_bin" / "python", "print(json.dumps(sys.argv[1:]))\nsys.exit(4)")
    done = run(world, task(world), tmp_path / "work", {"PATH": f"{world.folder / 'host_bin'}:/usr/bin:/bin", number: "7"})
    assert done.returncode == 4, done.stderr
    assert json.loads(done.stdout) == [*TOKENIZE[2:], '--text_field=7/64 it\'s "a" $HOME']
    with tarfile.open(world.folder / "tokens.tar.gz") as archive:
        assert "code/experiments/tokenize.py" in archive.getnames()


@LAUNCHERS
def test_the_tasks_build_a_store(launcher, place, number, task, tmp_path, gcs):
    """One after the other, with a stand-in for the bucket: the last one finishes the store."""
    bucket = f"gs://{gcs.new_bucket()}"
    world = World(tmp_path / "world", buckets={bucket: "US-CENTRAL1"})
    for i in range(9):
        gcs.put(f"{bucket}/in/{i}.jsonl", f'{{"text": "document {i}"}}\n'.encode())
    tokenize = [*TOKENIZE[:4], f"--input={bucket}/in/*.jsonl", f"--output={bucket}/tokens", "--workers=1", "--validation_fraction=0.3"]
    own = ["--name=tokens", place, "--tasks=2", f"--code={bucket}/code"]
    result = world.run(launcher, *own, *tokenize, "--shard={task}/{tasks}")
    assert result.returncode == 0, result.stderr
    world.write(world.folder / "host_bin" / "pip", "pass")
    path = f"{world.folder / 'host_bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    for shard, said in (1, "not there yet: "), (0, f"{bucket}/tokens is finished"):
        done = run(world, task(world), tmp_path / f"work{shard}", os.environ | {"PATH": path, number: str(shard)})
        assert done.returncode == 0 and said in done.stdout, done.stderr
    splits = make_sources(f"{bucket}/tokens")
    assert sorted(text for split in splits for text in documents_of(split)) == [f"document {i}" for i in range(9)]


@LAUNCHERS
@pytest.mark.parametrize("missing", ["code", "tokens"])
def test_a_bucket_that_is_not_there(launcher, place, number, task, missing, tmp_path):
    world = World(tmp_path / "world")
    where = {"code": "gs://bucket/code", "tokens": "gs://bucket/tokens"} | {missing: f"gs://elsewhere/{missing}"}
    command = [*TOKENIZE[:-1], f"--output={where['tokens']}", PART]
    result = world.run(launcher, "--name=tokens", place, "--tasks=64", f"--code={where['code']}", *command)
    assert result.returncode == 2 and "gcloud storage buckets create gs://elsewhere --location=" in result.stderr
    assert {tuple(call[1:4]) for call in world.calls()} == {("storage", "buckets", "describe")}


OWN = ["--name=tokens", "--tasks=64", "--code=gs://bucket/code"]
REFUSED = [
    (OWN[1:], [*TOKENIZE, PART], "give --name"),
    (OWN[:2], [*TOKENIZE, PART], "give --code"),
    ([*OWN, "--name=Tokens"], [*TOKENIZE, PART], "--name=Tokens: small letters"),
    ([*OWN, "--code=runs/code"], [*TOKENIZE, PART], "is not a folder of a bucket"),
    ([*OWN, "--code=gs://"], [*TOKENIZE, PART], "is not a folder of a bucket"),
    (OWN, TOKENIZE, "all 64 tasks would do the same"),
    (OWN, [*TOKENIZE[:-1], "--output=tokens", PART], "would write to tokens on machines that are deleted"),
    (OWN, [*TOKENIZE, PART, "--otuput=x"], "did you mean --output?"),
]


@LAUNCHERS
@pytest.mark.parametrize("own, command, said", REFUSED, ids=range(len(REFUSED)))
def test_refused_before_anything_is_created(launcher, place, number, task, own, command, said, tmp_path):
    world = World(tmp_path / "world")
    result = world.run(launcher, place, *own, *command)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert world.calls() == []
