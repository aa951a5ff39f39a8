"""Start an array of tasks on Google Cloud Batch, such as the parts of a token store; no TPU or GPU.

    python -m launch.cloud_batch --name=tokens --location=us-central1 --tasks=64 --spot --code=gs://BUCKET/code -- \\
        python -m experiments.tokenize --input=gs://BUCKET/*.parquet --output=gs://BUCKET/tokens '--shard={task}/{tasks}'
    python -m launch.cloud_batch --dry_run ...         # every command that would be run, and nothing is

Batch makes the machines, runs each task (up to three times again where it failed or its machine was taken away) and deletes the machines
at the end, without this machine. Exit code 0: queued; 1: Google Cloud failed; 2: a mistake in what was asked for.
"""

import json
import re
import shlex
import sys

from absl import flags

from experiments import cli
from hybrid_jax.amounts import count
from hybrid_jax.config import ConfigError
from launch import arrays, shell
from launch.arrays import CODE, DRY_RUN, NAME, RETRIES, SPOT, TASKS

LOCATION = flags.DEFINE_string("location", None, "Region of the machines, such as us-central1: that of the buckets.")
PROJECT = flags.DEFINE_string("project", None, "Google Cloud project; gcloud's own default if not given.")
MACHINE_TYPE = flags.DEFINE_string("machine_type", "e2-standard-8", "The machine that each task has for itself.")
IMAGE = flags.DEFINE_string("image", "python:3.12", "Docker image that the tasks run in.")


def definition(line: str) -> dict:
    """The job, as in https://docs.cloud.google.com/batch/docs/reference/rest/v1/projects.locations.jobs."""
    container = {"imageUri": IMAGE.value, "entrypoint": "/bin/bash", "commands": ["-c", arrays.script(line)]}
    task = {
        "runnables": [{"container": container}],
        "volumes": [{"gcs": {"remotePath": CODE.value.removeprefix("gs://").rstrip("/")}, "mountPath": arrays.MOUNTED}],
        "maxRetryCount": RETRIES,
    }
    machine = {"machineType": MACHINE_TYPE.value, "provisioningModel": "SPOT" if SPOT.value else "STANDARD"}
    return {
        "taskGroups": [{"taskSpec": task, "taskCount": TASKS.value, "taskCountPerNode": 1}],
        "allocationPolicy": {"instances": [{"policy": machine}]},
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }


def where() -> list[str]:
    return [f"--location={LOCATION.value}", *([f"--project={PROJECT.value}"] if PROJECT.value else [])]


def submit() -> list[str]:
    """https://docs.cloud.google.com/sdk/gcloud/reference/batch/jobs/submit; the definition comes on its standard input."""
    return ["gcloud", "batch", "jobs", "submit", NAME.value, *where(), "--config=-"]


def main(argv: list[str]) -> int:
    array = arrays.check(argv, __doc__, {"location": ", such as us-central1"}, ["gcloud"], "BATCH_TASK_INDEX", longest=63)
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+", LOCATION.value):
        raise ConfigError(f"--location={LOCATION.value} is not a region; it looks like us-central1")
    text = json.dumps(definition(array.line), indent=2)
    if DRY_RUN.value:
        array.show_buckets(PROJECT.value)
        shell.show(arrays.upload(f"{NAME.value}.tar.gz", PROJECT.value))
        shell.show(submit(), text)
        return 0
    array.check_buckets(PROJECT.value, LOCATION.value)
    array.copy_code(PROJECT.value)
    shell.do(submit(), "Google Cloud did not take the job; nothing was started", text)
    about = [NAME.value, *where()]
    print(
        f"{NAME.value} is queued: {count(TASKS.value, 'task')}, each on a {MACHINE_TYPE.value} that is deleted when it is done\n"
        f"  how it is:  {shlex.join(['gcloud', 'batch', 'jobs', 'describe', *about])}\n"
        "  its logs:   https://console.cloud.google.com/batch/jobs\n"
        f"  delete it:  {shlex.join(['gcloud', 'batch', 'jobs', 'delete', *about])}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv)))
