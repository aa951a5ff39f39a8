"""Cloud Batch, with a stand-in for gcloud."""

import json
import subprocess
import tarfile

import pytest

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
