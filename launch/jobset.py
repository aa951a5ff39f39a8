"""Start an array of tasks on a GKE cluster, as a Kubernetes JobSet, such as the parts of a token store; no TPU or GPU.

    python -m launch.jobset --name=tokens --context=gke_PROJECT_us-central1_CLUSTER --tasks=64 --spot --code=gs://BUCKET/code -- \\
        python -m experiments.tokenize --input=gs://BUCKET/*.parquet --output=gs://BUCKET/tokens '--shard={task}/{tasks}'
    python -m launch.jobset --dry_run ...              # every command that would be run and the manifest, and nothing is

The cluster runs each task (up to three times again where it failed, as often as its node was taken away), without this machine. It needs
the JobSet controller and the Cloud Storage FUSE driver. Exit code 0: queued; 1: Google Cloud or the cluster failed; 2: a mistake in what
was asked for, the cluster's own refusal included.
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path

from absl import flags

from experiments import cli
from hybrid_jax.amounts import count
from hybrid_jax.config import ConfigError
from launch import arrays, shell
from launch.arrays import DRY_RUN, NAME, RETRIES, SPOT, TASKS

CONTEXT = flags.DEFINE_string("context", None, "The cluster, by its name in kubectl config get-contexts.")
CPUS = flags.DEFINE_integer("cpus", 8, "CPUs of each task, with 4 GiB of memory for each CPU.", lower_bound=1)
IMAGE = flags.DEFINE_string("image", "python:3.13", "Docker image that the tasks run in.")

TASK = "task"  # what JobSet calls the job, and the job its container
GIB_PER_CPU = 4
DISK = "10Gi"  # for the packages that a task installs: Autopilot's most, where 1 GiB is what it gives unasked
SPOT_NODES = "cloud.google.com/gke-spot"


def manifest(line: str) -> dict:
    """The JobSet: one job, with a pod for each task. One that fails for good lets the others go on.

    Fields as in https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2
    and https://kubernetes.io/docs/concepts/workloads/controllers/job.
    """
    lost_its_node = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    tasks = {
        "completionMode": "Indexed",
        "completions": TASKS.value,
        "parallelism": TASKS.value,
        "backoffLimitPerIndex": RETRIES,
        "podFailurePolicy": {"rules": [lost_its_node]},
        "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": pod(line)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": NAME.value},
        "spec": {"replicatedJobs": [{"name": TASK, "replicas": 1, "template": {"spec": tasks}}]},
    }


def pod(line: str) -> dict:
    """Of one task, with the code's folder of the bucket mounted.

    As in https://docs.cloud.google.com/kubernetes-engine/docs/how-to/cloud-storage-fuse-csi-driver-ephemeral.
    """
    bucket, path = arrays.split()
    only = f"implicit-dirs,only-dir={path}" if path else "implicit-dirs"
    mount = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": {"bucketName": bucket, "mountOptions": only}}
    size = {"cpu": str(CPUS.value), "memory": f"{GIB_PER_CPU * CPUS.value}Gi", "ephemeral-storage": DISK}
    container = {
        "name": TASK,
        "image": IMAGE.value,
        "command": ["/bin/bash", "-c", arrays.script(line)],
        # Python counts the CPUs of the node, and from 3.13 on is told those of the task.
        "env": [{"name": "PYTHON_CPU_COUNT", "value": str(CPUS.value)}],
        "resources": {"requests": size, "limits": size},
        "volumeMounts": [{"name": "code", "mountPath": arrays.MOUNTED, "readOnly": True}],
    }
    spot = {
        "nodeSelector": {SPOT_NODES: "true"},
        "tolerations": [{"key": SPOT_NODES, "operator": "Equal", "value": "true", "effect": "NoSchedule"}],
    }
    return {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "code", "csi": mount}],
        **(spot if SPOT.value else {}),
    }


def kubectl(*words: str) -> list[str]:
    return ["kubectl", f"--context={CONTEXT.value}", *words]


def create(file: str, *options: str) -> list[str]:
    return kubectl("create", f"--filename={file}", *options)


def main(argv: list[str]) -> int:
    needed = {"context": ", one of kubectl config get-contexts"}
    array = arrays.check(argv, __doc__, needed, ["gcloud", "kubectl"], "JOB_COMPLETION_INDEX", longest=40)
    text = json.dumps(manifest(array.line), indent=2)
    asked = "--dry-run=server"  # all that the cluster would say of it, and nothing is created
    if DRY_RUN.value:
        array.show_buckets()
        print(f"# {NAME.value}.json:\n{text}")
        shell.show(create(f"{NAME.value}.json", asked))
        shell.show(arrays.upload(f"{NAME.value}.tar.gz"))
        shell.show(create(f"{NAME.value}.json"))
        return 0
    array.check_buckets()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / f"{NAME.value}.json"
        file.write_text(text)
        answer = shell.ask(create(str(file), asked))
        if answer.returncode:
            raise ConfigError(f"the cluster would not take the job: {shell.reason(answer)}; nothing was created")
        array.copy_code()
        left = shlex.join(kubectl("get", "jobset", NAME.value))
        shell.do(create(str(file)), f"the cluster did not take the job; {left} says whether anything is left of it")
    _say_how_it_goes_on()
    return 0


def _say_how_it_goes_on() -> None:
    its = f"--selector=jobset.sigs.k8s.io/jobset-name={NAME.value}"
    log = ("--follow", "--prefix", "--tail=-1", f"--container={TASK}", f"--max-log-requests={TASKS.value}")
    print(
        f"{NAME.value} is queued: {count(TASKS.value, 'task')} of {count(CPUS.value, 'CPU')}, which the cluster starts as it has room\n"
        f"  how it is:  {shlex.join(kubectl('get', 'jobs,pods', its))}\n"
        f"  follow it:  {shlex.join(kubectl('logs', its, *log))}\n"
        f"  delete it:  {shlex.join(kubectl('delete', 'jobset', NAME.value))}"
    )


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv)))
