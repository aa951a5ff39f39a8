"""Cloud Batch, with a stand-in for gcloud."""

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
BASE = ["--name=tokens", "--location=us-central1", "--tasks=64", "--code=gs://bucket/code"]


@pytest.fixture
def world(tmp_path):
    return lambda **scenario: World(tmp_path / "world", **scenario)


def test_an_array_of_tasks(world, tmp_path):
    world = world()
    result = world.run("launch.cloud_batch", *BASE, "--spot", "--machine_type=c3-standard-22", *TOKENIZE, PART)
    assert result.returncode == 0, result.stderr
    upload, submit = world.calls("gcloud")
    assert upload[1:3] == ["storage", "cp"] and upload[-1] == "gs://bucket/code/tokens.tar.gz"
    assert submit[1:] == ["batch", "jobs", "submit", "tokens", "--location=us-central1", "--config=-"]
    assert "gcloud batch jobs delete tokens --location=us-central1" in result.stdout
    definition = json.loads((world.folder / "gcloud.stdin").read_text())
    (group,) = definition["taskGroups"]
    assert group["taskCount"] == 64 and group["taskSpec"]["maxRetryCount"] == 3
    assert group["taskSpec"]["volumes"] == [{"gcs": {"remotePath": "bucket/code"}, "mountPath": "/mnt/disks/code"}]
    policy = definition["allocationPolicy"]["instances"][0]["policy"]
    assert policy == {"machineType": "c3-standard-22", "provisioningModel": "SPOT"}

    # What a task does, done here: from the archive that was copied, with a Python that only says what it was given.
    container = group["taskSpec"]["runnables"][0]["container"]
    assert container["entrypoint"] == "/bin/bash" and container["commands"][0] == "-c"
    script = container["commands"][1].replace("/mnt/disks/code", str(world.folder)).replace("/work", str(tmp_path / "work"))
    world.write(world.folder / "host_bin" / "pip", "assert sys.argv[-1] == '.' and Path('setup.cfg').is_file()")
    world.write(world.folder / "host_bin" / "python", "print(json.dumps(sys.argv[1:]))\nsys.exit(4)")
    environment = {"PATH": f"{world.folder / 'host_bin'}:/usr/bin:/bin", "WORLD": str(world.folder), "BATCH_TASK_INDEX": "7"}
    task = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert task.returncode == 4, task.stderr
    assert json.loads(task.stdout) == [*TOKENIZE[2:], '--text_field=7/64 it\'s "a" $HOME']
    with tarfile.open(world.folder / "tokens.tar.gz") as archive:
        assert "code/experiments/tokenize.py" in archive.getnames()


def test_the_tasks_build_a_store(world, tmp_path, gcs):
    """What the tasks of an array do, done here one after the other, with a stand-in for the bucket: the last one finishes the store."""
    bucket, world = f"gs://{gcs.new_bucket()}", world()
    for i in range(9):
        gcs.put(f"{bucket}/in/{i}.jsonl", f'{{"text": "document {i}"}}\n'.encode())
    tokenize = [*TOKENIZE[:4], f"--input={bucket}/in/*.jsonl", f"--output={bucket}/tokens", "--workers=1", "--validation_fraction=0.3"]
    result = world.run("launch.cloud_batch", *BASE[:2], "--tasks=2", BASE[3], *tokenize, "--shard={task}/{tasks}")
    assert result.returncode == 0, result.stderr
    (group,) = json.loads((world.folder / "gcloud.stdin").read_text())["taskGroups"]
    script = group["taskSpec"]["runnables"][0]["container"]["commands"][1].replace("/mnt/disks/code", str(world.folder))
    world.write(world.folder / "host_bin" / "pip", "pass")
    path = f"{world.folder / 'host_bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    for task, said in (1, "are not there yet"), (0, f"{bucket}/tokens is finished"):
        here = script.replace("/work", str(tmp_path / f"work{task}"))
        environment = os.environ | {"PATH": path, "WORLD": str(world.folder), "BATCH_TASK_INDEX": str(task)}
        done = subprocess.run(["bash", "-c", here], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    splits = make_sources(f"{bucket}/tokens")
    assert sorted(text for split in splits for text in documents_of(split)) == [f"document {i}" for i in range(9)]


def test_dry_run(world):
    world = world()
    result = world.run("launch.cloud_batch", *BASE, "--dry_run", *TOKENIZE, PART)
    assert result.returncode == 0 and world.calls() == []
    assert "gcloud storage cp tokens.tar.gz gs://bucket/code/tokens.tar.gz" in result.stdout
    assert "gcloud batch jobs submit tokens --location=us-central1 --config=- <<'END'" in result.stdout


REFUSED = [
    (BASE[1:], [*TOKENIZE, PART], "give --name"),
    ([*BASE[:1], *BASE[2:]], [*TOKENIZE, PART], "give --location"),
    (BASE[:3], [*TOKENIZE, PART], "give --code"),
    ([*BASE, "--location=us-central1-a"], [*TOKENIZE, PART], "is not a region"),
    ([*BASE, "--code=runs/code"], [*TOKENIZE, PART], "is not a folder of a bucket"),
    (BASE, TOKENIZE, "all 64 tasks would do the same"),
    (BASE, [*TOKENIZE[:-1], "--output=tokens", PART], "would write to tokens on machines that are deleted"),
    (BASE, [*TOKENIZE, PART, "--otuput=x"], "did you mean --output?"),
]


@pytest.mark.parametrize("own, command, said", REFUSED, ids=range(len(REFUSED)))
def test_refused_before_anything_is_created(world, own, command, said):
    world = world()
    result = world.run("launch.cloud_batch", *own, *command)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert world.calls() == []
