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
import tempfile
from pathlib import Path

from absl import flags

from experiments import cli
from hybrid_jax.config import ConfigError
from launch import code, job, shell

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

MOUNTED = "/mnt/disks/code"
RETRIES = 3


def script(line: str) -> str:
    """What each task runs."""
    before = f"set -e\nmkdir /work\ntar -xzf {MOUNTED}/{NAME.value}.tar.gz -C /work\ncd /work/code\npip install --quiet .\nset +e\n"
    return job.script(line, before + "export PYTHONUNBUFFERED=1\n")


def definition(line: str) -> dict:
    """The job, as in https://docs.cloud.google.com/batch/docs/reference/rest/v1/projects.locations.jobs."""
    container = {"imageUri": IMAGE.value, "entrypoint": "/bin/bash", "commands": ["-c", script(line)]}
    task = {
        "runnables": [{"container": container}],
        "volumes": [{"gcs": {"remotePath": CODE.value.removeprefix("gs://").rstrip("/")}, "mountPath": MOUNTED}],
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


def upload(bundle: str) -> list[str]:
    project = [f"--project={PROJECT.value}"] if PROJECT.value else []
    return ["gcloud", "storage", "cp", bundle, f"{CODE.value.rstrip('/')}/{NAME.value}.tar.gz", *project]


def submit() -> list[str]:
    """https://docs.cloud.google.com/sdk/gcloud/reference/batch/jobs/submit; the definition comes on its standard input."""
    return ["gcloud", "batch", "jobs", "submit", NAME.value, *where(), "--config=-"]


def main(argv: list[str]) -> int:
    _, command = job.parse(argv, __doc__)
    _check_flags()
    wanted = job.check(command)
    job.check_tasks(wanted, TASKS.value)
    job.check_results_outlive(wanted)
    folder = code.root()
    code.check_config(folder, wanted.value("config"))
    shell.need("gcloud")
    job_definition = json.dumps(definition(job.shell_line(wanted, "BATCH_TASK_INDEX", TASKS.value)), indent=2)
    code.note_left_behind(folder)
    if DRY_RUN.value:
        shell.show(upload(f"{NAME.value}.tar.gz"))
        shell.show(submit(), job_definition)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Path(temporary) / f"{NAME.value}.tar.gz"
        code.pack(folder, bundle, {})
        shell.do(upload(str(bundle)), f"the code could not be copied to {CODE.value}; nothing was started")
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
    if not CODE.value.startswith("gs://"):
        raise ConfigError(f"--code={CODE.value} is not a folder of a bucket, gs://BUCKET/FOLDER")


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv)))
