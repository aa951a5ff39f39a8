"""JobSets on GKE, with stand-ins for kubectl and gcloud. What their tasks do: test_arrays.py."""

import json
import shlex

import pytest

from tests.launch.stand_ins import World

TOKENIZE = ["--", "python", "-m", "experiments.tokenize", "--input=gs://bucket/*.parquet", "--output=gs://bucket/tokens"]
PART = "--shard={task}/{tasks}"
CONTEXT = "--context=gke_p_us-central1_pods"
BASE = ["--name=tokens", CONTEXT, "--tasks=64", "--code=gs://bucket/code/v1/"]
DESCRIBE, UPLOAD = ["storage", "buckets", "describe"], ["storage", "cp"]


@pytest.fixture
def world(tmp_path):
    return lambda **scenario: World(tmp_path / "world", **scenario)


def test_an_array_of_tasks(world):
    world = world()
    result = world.run("launch.jobset", *BASE, "--spot", "--cpus=16", "--image=python:3.14", *TOKENIZE, PART)
    assert result.returncode == 0, result.stderr
    describe, asked, upload, created = world.calls()
    assert describe[1:5] == [*DESCRIBE, "gs://bucket"]
    assert upload[1:3] == UPLOAD and upload[-1] == "gs://bucket/code/v1/tokens.tar.gz"
    assert asked[:-1] == created and created[:3] == ["kubectl", CONTEXT, "create"] and asked[-1] == "--dry-run=server"
    jobset = json.loads((world.folder / "jobset.json").read_text())
    (tasks,) = jobset["spec"]["replicatedJobs"]
    tasks = tasks["template"]["spec"]
    assert (tasks["completions"], tasks["parallelism"], tasks["backoffLimitPerIndex"]) == (64, 64, 3)
    assert tasks["podFailurePolicy"]["rules"][0]["action"] == "Ignore"
    pod = tasks["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"} == {each["key"]: each["value"] for each in pod["tolerations"]}
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {"bucketName": "bucket", "mountOptions": "implicit-dirs,only-dir=code/v1"}
    (container,) = pod["containers"]
    assert container["image"] == "python:3.14" and container["env"] == [{"name": "PYTHON_CPU_COUNT", "value": "16"}]
    assert container["resources"]["limits"] == {"cpu": "16", "memory": "64Gi", "ephemeral-storage": "10Gi"}


def test_what_is_printed_goes_on_with_it(world):
    world = world()
    result = world.run("launch.jobset", *BASE[:3], "--code=gs://bucket", *TOKENIZE, PART)
    assert result.returncode == 0, result.stderr
    pod = json.loads((world.folder / "jobset.json").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "nodeSelector" not in pod and pod["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"] == "implicit-dirs"
    lines = [shlex.split(line.split(":  ")[1]) for line in result.stdout.splitlines() if line.startswith("  ")]
    its = "--selector=jobset.sigs.k8s.io/jobset-name=tokens"
    assert [line[:4] for line in lines[:2]] == [["kubectl", CONTEXT, "get", "jobs,pods"], ["kubectl", CONTEXT, "logs", its]]
    assert f"--container={pod['containers'][0]['name']}" in lines[1] and "--max-log-requests=64" in lines[1]
    assert lines[2] == ["kubectl", CONTEXT, "delete", "jobset", "tokens"]


def test_dry_run(world):
    world = world()
    result = world.run("launch.jobset", *BASE, "--dry_run", *TOKENIZE, PART)
    assert result.returncode == 0 and world.calls() == []
    shown = result.stdout
    manifest = json.loads(shown[shown.index("{\n") : shown.index("\n}\n") + 2])
    assert manifest["kind"] == "JobSet" and manifest["metadata"] == {"name": "tokens"}
    commands = [line for line in shown.splitlines() if line.startswith(("gcloud", "kubectl"))]
    assert commands == [
        "gcloud storage buckets describe gs://bucket '--format=value(location)'",
        f"kubectl {CONTEXT} create --filename=tokens.json --dry-run=server",
        "gcloud storage cp tokens.tar.gz gs://bucket/code/v1/tokens.tar.gz",
        f"kubectl {CONTEXT} create --filename=tokens.json",
    ]


@pytest.mark.parametrize(
    "own, said",
    [
        ([*BASE[:1], *BASE[2:]], "give --context, one of kubectl config get-contexts"),
        ([*BASE, "--cpus=0"], "--cpus"),
    ],
)
def test_refused_before_anything_is_created(world, own, said):
    world = world()
    result = world.run("launch.jobset", *own, *TOKENIZE, PART)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert world.calls() == []


@pytest.mark.parametrize(
    "scenario, said",
    [
        ({"contexts": []}, "gcloud container clusters get-credentials"),
        ({"no_jobsets": True}, "install its controller: https://jobset.sigs.k8s.io/docs/installation"),
        ({"jobsets": ["tokens"]}, "give another --name, or kubectl delete that one first"),
    ],
)
def test_what_the_cluster_refuses_is_known_before_the_code_is_copied(world, scenario, said):
    world = world(**scenario)
    result = world.run("launch.jobset", *BASE, *TOKENIZE, PART)
    assert result.returncode == 2 and said in result.stderr and "nothing was created" in result.stderr
    assert [call[1:3] for call in world.calls("gcloud")] == [DESCRIBE[:2]] and not (world.folder / "jobset.json").exists()


def test_a_job_that_the_cluster_does_not_take_after_all(world):
    world = world(create_error="Unable to connect to the server: net/http: TLS handshake timeout")
    result = world.run("launch.jobset", *BASE, *TOKENIZE, PART)
    assert result.returncode == 1 and "TLS handshake timeout" in result.stderr
    assert f"kubectl {CONTEXT} get jobset tokens says whether anything is left of it" in result.stderr


@pytest.mark.parametrize("tool, said", [("kubectl", "gcloud components install kubectl"), ("gcloud", "https://cloud.google.com/sdk")])
def test_a_tool_is_missing(world, tool, said):
    world = world()
    world.remove(tool)
    result = world.run("launch.jobset", *BASE, *TOKENIZE, PART)
    assert result.returncode == 2 and f"{tool} is not on PATH" in result.stderr and said in result.stderr
    assert world.run("launch.jobset", "--dry_run", *BASE, *TOKENIZE, PART).returncode == 0  # runs nothing, and so needs nothing
    assert world.calls() == []
