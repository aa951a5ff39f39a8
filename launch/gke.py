"""Start a command on the TPUs of a GKE cluster, through xpk.

    python -m launch.gke run --name=gla --cluster=CLUSTER --accelerator=v5litepod-256 --zone=us-west4-a --project=PROJECT -- \\
        python -m experiments.train --config=configs/gla_r6.py:1b3 --workdir=gs://BUCKET/gla
    python -m launch.gke run --dry_run ...             # every command that would be run, and nothing is
    python -m launch.gke status|logs|delete --name=gla --cluster=CLUSTER --zone=us-west4-a --project=PROJECT

xpk puts the code into an image and queues the job; the cluster runs it, and starts it again when its machines are taken away, without
this machine. Exit code 0: done as asked; 1: xpk failed; 2: a mistake in what was asked for.
"""

import shlex
import sys
import tempfile
from pathlib import Path

from absl import flags

from experiments import cli
from hybrid_jax.config import ConfigError
from launch import accelerators, code, job, shell

NAME = flags.DEFINE_string("name", None, "Name of the workload: small letters, digits and -.")
CLUSTER = flags.DEFINE_string("cluster", None, "The GKE cluster, made by xpk cluster create.")
ZONE = flags.DEFINE_string("zone", None, "Zone of the cluster, such as us-west4-a.")
PROJECT = flags.DEFINE_string("project", None, "Google Cloud project of the cluster.")
ACCELERATOR = flags.DEFINE_string("accelerator", None, "Accelerator type, such as v5litepod-256 or tpu7x-128.")
SLICES = flags.DEFINE_integer("slices", 1, "How many slices of the --accelerator.", lower_bound=1)
RESTARTS = flags.DEFINE_integer("restarts", 50, "Times that the job is started again when its machines are taken away.", lower_bound=0)
IMAGE = flags.DEFINE_string("image", "python:3.12", "Docker image that the code is added to.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print every command, and run none.")

VERBS = ("run", "status", "logs", "delete")
# Patiently: a package index that does not answer one of the containers would end the job for all of them.
INSTALL = """\
for pause in 10 60 300 0; do
  pip install --quiet --root-user-action=ignore '.[tpu,gcs]' && break
  [[ $pause = 0 ]] && exit 1
  sleep "$pause"
done
"""
GRACE_SECONDS = 120  # between being asked to stop and being killed, to save a checkpoint in


def script(line: str) -> str:
    """What runs in every container. The cluster starts again what ends with `cli.STOPPED`; 1 and 2 end the job."""
    return job.script(line, INSTALL + "export PYTHONUNBUFFERED=1\n")


# The commands. Flags as in https://github.com/AI-Hypercomputer/xpk, docs/usage/workloads.md and src/xpk/parser/workload.py.


def where() -> list[str]:
    return [f"--cluster={CLUSTER.value}", f"--project={PROJECT.value}", f"--zone={ZONE.value}"]


def create(folder: str, accelerator: str) -> list[str]:
    wanted = [f"--tpu-type={accelerator}", f"--num-slices={SLICES.value}", f"--max-restarts={RESTARTS.value}"]
    stopping = f"--termination-grace-period-seconds={GRACE_SECONDS}"
    image = [f"--base-docker-image={IMAGE.value}", f"--script-dir={folder}", "--command=exec bash job.sh"]
    return ["xpk", "workload", "create", f"--workload={NAME.value}", *where(), *wanted, stopping, *image]


def status() -> list[str]:
    return ["xpk", "workload", "list", *where(), f"--filter-by-job={NAME.value}"]


def logs() -> list[str]:
    first = f"--selector=xpk.google.com/workload={NAME.value},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    return ["kubectl", "logs", "--follow", "--tail=-1", first]


def delete() -> list[str]:
    return ["xpk", "workload", "delete", f"--workload={NAME.value}", *where(), "--force"]


def typed(verb: str) -> str:
    return shlex.join(["python", "-m", "launch.gke", verb, f"--name={NAME.value}", *where()])


def main(argv: list[str]) -> int:
    verb, command = job.parse(argv, __doc__, VERBS)
    for flag in (NAME, CLUSTER, ZONE, PROJECT):
        if not flag.value:
            raise ConfigError(f"give --{flag.name}")
    job.check_name(NAME.value)
    accelerators.check_zone(ZONE.value)
    if verb == "run":
        return _run(command)
    # xpk turns kubectl to the cluster as it lists its jobs.
    commands = {"status": [status()], "logs": [status(), logs()], "delete": [delete()]}[verb]
    if DRY_RUN.value:
        for each in commands:
            shell.show(each)
        return 0
    shell.need(*[each[0] for each in commands])
    return next((failed for each in commands if (failed := shell.stream(each))), 0)


def _run(command: list[str]) -> int:
    if not ACCELERATOR.value:
        raise ConfigError("give --accelerator, such as --accelerator=v5litepod-256")
    accelerator = accelerators.find(ACCELERATOR.value, on_gke=True)
    wanted = job.check(command)
    job.check_results_outlive(wanted)
    folder = code.root()
    code.check_config(folder, wanted.value("config"))
    if not DRY_RUN.value:
        shell.need("xpk", "gcloud", "kubectl")  # the latter two are what xpk itself calls
    line = job.shell_line(wanted)
    print(f"{NAME.value}: {accelerator.describe(SLICES.value)}, in {CLUSTER.value}, to run {line}", flush=True)
    code.note_left_behind(folder)
    if DRY_RUN.value:
        print(f"# In a copy of what git tracks, with job.sh in it:\n{script(line).rstrip()}")
        shell.show(create(".", accelerator.name))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        code.stage(folder, Path(temporary), {"job.sh": script(line)})
        shell.do(
            create(temporary, accelerator.name), f"xpk did not create {NAME.value}; {typed('status')} says whether anything is left of it"
        )
    print(
        f"{NAME.value} is queued. The cluster runs it, up to {RESTARTS.value} times again, until it is done or deleted.\n"
        f"  how it is:  {typed('status')}\n  follow it:  {typed('logs')}\n  delete it:  {typed('delete')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv)))
