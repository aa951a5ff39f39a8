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
from hybrid_jax.config import ConfigError
from launch import buckets, code, job, shell
from launch.gcloud import describe_bucket

NAME = flags.DEFINE_string("name", None, "Of the job: small letters, digits and -.")
LOCATION = flags.DEFINE_string("location", None, "Region, such as us-central1: the bucket's.")
PROJECT = flags.DEFINE_string("project", None, "Google Cloud project; gcloud's own default if not given.")
TASKS = flags.DEFINE_integer(
    "tasks", 1, "Tasks, each with its own number, from 0, for {task} in the command, and their count for {tasks}.", lower_bound=1
)
MACHINE_TYPE = flags.DEFINE_string("machine_type", "e2-standard-8", "The machine that each task has for itself.")
SPOT = flags.DEFINE_bool("spot", False, "Spare capacity: cheaper, and taken away when wanted elsewhere.")
CODE = flags.DEFINE_string("code", None, "gs:// folder that the code is copied to, for the tasks to read.")
IMAGE = flags.DEFINE_string("image", "python:3.12", "Docker image that the tasks run in.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print every command, and run none.")

RETRIES = 3


def definition(line: str) -> dict:
    """The job, as in https://docs.cloud.google.com/batch/docs/reference/rest/v1/projects.locations.jobs."""
    container = {"imageUri": IMAGE.value, "entrypoint": "/bin/bash", "commands": ["-c", buckets.script(line, NAME.value)]}
    task = {
        "runnables": [{"container": container}],
        "volumes": [{"gcs": {"remotePath": CODE.value.removeprefix("gs://").rstrip("/")}, "mountPath": buckets.MOUNTED}],
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
    _, command = job.parse(argv, __doc__)
    _check_flags()
    wanted = job.check(command)
    job.check_tasks(wanted, TASKS.value)
    needed = buckets.needed(CODE.value, job.check_results_outlive(wanted))
    folder = code.root()
    code.check_config(folder, wanted.value("config"))
    if not DRY_RUN.value:
        shell.need("gcloud")
    job_definition = json.dumps(definition(job.shell_line(wanted, "BATCH_TASK_INDEX", TASKS.value)), indent=2)
    code.note_left_behind(folder)
    if DRY_RUN.value:
        for each in needed:
            shell.show(describe_bucket(each, PROJECT.value))
        shell.show(buckets.upload(f"{NAME.value}.tar.gz", CODE.value, NAME.value, PROJECT.value))
        shell.show(submit(), job_definition)
        return 0
    for each in needed:
        buckets.check(each, PROJECT.value, LOCATION.value)
    buckets.copy_code(folder, CODE.value, NAME.value, PROJECT.value)
    shell.do(submit(), "Google Cloud did not take the job; nothing was started", job_definition)
    about = [NAME.value, *where()]
    print(f"{NAME.value} is queued: {TASKS.value} tasks, each on a {MACHINE_TYPE.value}, which are deleted when they are done")
    print(f"  how it is:  {shlex.join(['gcloud', 'batch', 'jobs', 'describe', *about])}")
    print(
        "  its logs:   https://console.cloud.google.com/batch/jobs\n"
        f"  delete it:  {shlex.join(['gcloud', 'batch', 'jobs', 'delete', *about])}"
    )
    return 0


def _check_flags() -> None:
    for flag in (NAME, LOCATION, CODE):
        if not flag.value:
            raise ConfigError(f"give --{flag.name}")
    job.check_name(NAME.value, 63)
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+", LOCATION.value):
        raise ConfigError(f"--location={LOCATION.value} is not a region; it looks like us-central1")
    buckets.split(CODE.value)


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv)))
