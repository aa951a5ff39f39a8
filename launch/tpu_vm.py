"""Start a command on Cloud TPU VMs, follow it, take it up again after preemptions, and delete the machines at the end.

    python -m launch.tpu_vm run --name=gla --accelerator=v5litepod-256 --zone=us-west4-a --spot -- \\
        python -m experiments.train --config=configs/gla_r6.py:1b3 --workdir=gs://BUCKET/gla
    python -m launch.tpu_vm run --dry_run ...            # every command that would be run, and nothing is
    python -m launch.tpu_vm status --name=gla --zone=us-west4-a
    python -m launch.tpu_vm logs   --name=gla --zone=us-west4-a
    python -m launch.tpu_vm delete --name=gla --zone=us-west4-a

The same `run` again goes on with machines that are there. Ctrl-C asks whether to delete them. Exit code 0: done, machines deleted;
1: the job failed or Google Cloud did, and what is left is said; 2: a mistake in what was asked for; 130: Ctrl-C.
"""

import sys
import tempfile
from pathlib import Path

from absl import flags

from experiments import cli
from hybrid_jax.config import ConfigError
from hybrid_jax.config.errors import meant
from launch import accelerators, buckets, code, hosts, job, shell, supervise
from launch.gcloud import Tpu, describe_bucket

NAME = flags.DEFINE_string("name", None, "Name of the queued resource: small letters, digits and -.")
ZONE = flags.DEFINE_string("zone", None, "Zone of the machines, such as us-west4-a.")
PROJECT = flags.DEFINE_string("project", None, "Google Cloud project; gcloud's own default if not given.")
ACCELERATOR = flags.DEFINE_string("accelerator", None, "Accelerator type, such as v5litepod-256.")
SLICES = flags.DEFINE_integer("slices", 1, "How many slices of the --accelerator, joined by the data centre's network.", lower_bound=1)
SPOT = flags.DEFINE_bool("spot", False, "Spare capacity: cheaper, and taken away when wanted elsewhere.")
RESERVED = flags.DEFINE_bool("reserved", False, "Capacity that the project has reserved.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print every command, and run none.")

VERBS = ("run", "status", "logs", "delete")


def main(argv: list[str]) -> int:
    verb, command = job.parse(argv, __doc__, VERBS)
    tpu = _tpu()
    if verb == "run":
        return _run(tpu, command)
    if DRY_RUN.value:
        for each in {
            "status": [tpu.state(), hosts.status(tpu)],
            "logs": [hosts.logs(tpu)],
            "delete": [tpu.delete()],
        }[verb]:
            shell.show(each)
        return 0
    shell.need("gcloud")
    return {"status": supervise.status, "logs": supervise.logs, "delete": supervise.delete}[verb](tpu)


def _tpu() -> Tpu:
    for flag in (NAME, ZONE):
        if not flag.value:
            raise ConfigError(f"give --{flag.name}")
    job.check_name(NAME.value)
    accelerators.check_zone(ZONE.value)
    return Tpu(NAME.value, ZONE.value, PROJECT.value)


def _run(tpu: Tpu, command: list[str]) -> int:
    # ---- Can it be done? Nothing is created yet.
    if not ACCELERATOR.value:
        raise ConfigError("give --accelerator, such as --accelerator=v5litepod-256")
    accelerator = accelerators.find(ACCELERATOR.value)
    if SPOT.value and RESERVED.value:
        raise ConfigError("--spot and --reserved exclude each other")
    wanted = job.check(command)
    bucket = job.check_results_outlive(wanted)
    folder = code.root()
    code.check_config(folder, wanted.value("config"))
    if not DRY_RUN.value:
        shell.need("gcloud")

    tier = "spot" if SPOT.value else "reserved" if RESERVED.value else None
    line = job.shell_line(wanted)
    create = tpu.create(accelerator.name, accelerator.generation.runtime, SLICES.value, tier)
    print(f"{tpu.name}: {accelerator.describe(SLICES.value)}, {tier or 'on demand'}, in {tpu.zone}, to run {line}", flush=True)
    code.note_left_behind(folder)
    if note := accelerators.zone_note(accelerator, tpu.zone):
        print(f"note: {note}")
    if DRY_RUN.value:
        return _show(tpu, create, bucket, line)
    _check_offered(tpu, accelerator.name)
    if bucket:
        buckets.check(bucket, tpu.project, tpu.zone.rpartition("-")[0])

    # ---- From here on there may be machines.
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Path(temporary) / f"{tpu.name}.tar.gz"
        code.pack(folder, bundle, hosts.scripts(line))
        return supervise.run(supervise.Plan(tpu, create, line, bundle, SLICES.value * accelerator.hosts))


def _check_offered(tpu: Tpu, accelerator: str) -> None:
    """Ask Google Cloud whether the zone has it."""
    listed = shell.ask(tpu.list_types())
    if listed.returncode:
        raise ConfigError(f"Google Cloud does not list the TPUs of {tpu.zone}: {shell.reason(listed)}; nothing was created")
    offered = listed.stdout.split()
    if accelerator not in offered:
        family = [each for each in offered if each.split("-")[0] == accelerator.split("-")[0]]
        raise ConfigError(f"{tpu.zone} does not offer {accelerator}; {meant(accelerator, family or offered)}; nothing was created")


def _show(tpu: Tpu, create: list[str], bucket: str | None, line: str) -> int:
    """What ``run`` does when nothing goes wrong, as commands."""
    print("# Does the zone have it, and is the bucket there?")
    shell.show(tpu.list_types())
    if bucket:
        shell.show(describe_bucket(bucket, tpu.project))
    print("# Ask for the machines, and wait until they are ACTIVE.")
    shell.show(create)
    shell.show(tpu.state())
    print("# Copy the code, install it, start the command on every host.")
    for name, text in hosts.scripts(line).items():
        print(f"# ---- {name}\n{text.rstrip()}")
    for each in hosts.set_up(tpu, Path(f"{tpu.name}.tar.gz")):
        shell.show(each)
    print("# Follow it; when it ends, ask every host how. Preempted: delete, create and start again.")
    shell.show(hosts.logs(tpu))
    shell.show(hosts.status(tpu))
    print("# At the end, however it ended.")
    shell.show(tpu.delete())
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv)))
