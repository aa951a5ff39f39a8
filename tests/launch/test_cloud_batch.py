"""Cloud Batch, with a stand-in for gcloud. What its tasks do: test_arrays.py."""

import json

import pytest

from tests.launch.stand_ins import World

TOKENIZE = ["--", "python", "-m", "experiments.tokenize", "--input=gs://bucket/*.parquet", "--output=gs://bucket/tokens"]
PART = "--shard={task}/{tasks}"
BASE = ["--name=tokens", "--location=us-central1", "--tasks=64", "--code=gs://bucket/code"]


@pytest.fixture
def world(tmp_path):
    return lambda **scenario: World(tmp_path / "world", **scenario)


def test_an_array_of_tasks(world):
    world = world()
    result = world.run("launch.cloud_batch", *BASE, "--spot", "--machine_type=c3-standard-22", *TOKENIZE, PART)
    assert result.returncode == 0, result.stderr
    _, upload, submit = world.calls("gcloud")
    assert upload[1:3] == ["storage", "cp"] and upload[-1] == "gs://bucket/code/tokens.tar.gz"
    assert submit[1:] == ["batch", "jobs", "submit", "tokens", "--location=us-central1", "--config=-"]
    assert "gcloud batch jobs delete tokens --location=us-central1" in result.stdout
    definition = json.loads((world.folder / "gcloud.stdin").read_text())
    (group,) = definition["taskGroups"]
    assert group["taskCount"] == 64 and group["taskSpec"]["maxRetryCount"] == 3
    assert group["taskSpec"]["volumes"] == [{"gcs": {"remotePath": "bucket/code"}, "mountPath": "/mnt/disks/code"}]
    policy = definition["allocationPolicy"]["instances"][0]["policy"]
    assert policy == {"machineType": "c3-standard-22", "provisioningModel": "SPOT"}


def test_dry_run(world):
    world = world()
    result = world.run("launch.cloud_batch", *BASE, "--dry_run", *TOKENIZE, PART)
    assert result.returncode == 0 and world.calls() == []
    assert "gcloud storage buckets describe gs://bucket '--format=value(location)'" in result.stdout
    assert "gcloud storage cp tokens.tar.gz gs://bucket/code/tokens.tar.gz" in result.stdout
    assert "gcloud batch jobs submit tokens --location=us-central1 --config=- <<'END'" in result.stdout


@pytest.mark.parametrize(
    "own, said",
    [
        ([*BASE[:1], *BASE[2:]], "give --location, such as us-central1"),
        ([*BASE, "--location=us-central1-a"], "is not a region"),
    ],
)
def test_refused_before_anything_is_created(world, own, said):
    world = world()
    result = world.run("launch.cloud_batch", *own, *TOKENIZE, PART)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert world.calls() == []
