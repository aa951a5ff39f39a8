"""Start a command on the GPU hosts of a SLURM cluster, or an array of tasks on any of its nodes.

    python -m launch.slurm --name=gla --nodes=4 --gpus_per_node=8 --time=24:00:00 -- \\
        python -m experiments.train --config=configs/gla_r6.py:1b3 --workdir=/shared/runs/gla
    python -m launch.slurm --name=tokens --array=64 --cpus=16 --time=4:00:00 -- \\
        python -m experiments.tokenize --input='/shared/*.parquet' --output=/shared/tokens '--shard={task}/{tasks}'
    python -m launch.slurm --dry_run ...               # the script and the command that would be run, and nothing is

Run it on a login node, from a folder that the nodes see too, with the Python whose environment the job is to have. Ten minutes before its
time is over (or when it is preempted, where the cluster sends the job's signal then) the trainer is asked to save, and the job is queued
again: it goes on from there, as often as it takes. Exit code 0: queued; 1: sbatch failed; 2: a mistake in what was asked for.
"""

import os
import re
import shlex
import sys

from absl import flags

from experiments import cli
from hybrid_jax.config import ConfigError
from launch import job, shell

NAME = flags.DEFINE_string("name", None, "Name of the job: letters, digits, ., _ and -.")
NODES = flags.DEFINE_integer("nodes", 1, "How many of the cluster's nodes the job has, or each task of an --array.", lower_bound=1)
GPUS = flags.DEFINE_integer("gpus_per_node", 0, "GPUs of each node, and a process for each; 0: none, one process a node.", lower_bound=0)
CPUS = flags.DEFINE_integer("cpus", None, "CPUs of each process; the cluster's default if not given.", lower_bound=1)
TIME = flags.DEFINE_string("time", None, "Time until the job is stopped and queued again, such as 24:00:00 or 2-00:00:00.")
PARTITION = flags.DEFINE_string("partition", None, "Partition of the cluster; its default if not given.")
ACCOUNT = flags.DEFINE_string("account", None, "Account that the job is charged to; the cluster's default if not given.")
ARRAY = flags.DEFINE_integer(
    "array", 1, "How many tasks. In the command {task} stands for the number of each, from 0, and {tasks} for their count."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the script and the command, and run nothing.")

SIGNAL_SECONDS = 600  # before the end of its time; SLURM may send it up to a minute earlier


def script(line: str) -> str:
    """The batch script, which SLURM runs on the job's first node.

    Options as in https://slurm.schedmd.com/sbatch.html. A process a GPU, each of which sees all of its node's GPUs and takes the one of its
    local number, is what jax.distributed makes of SLURM's variables (jax/_src/clusters/slurm_cluster.py): no GPU is bound to a task.
    """
    several = ARRAY.value > 1
    # One task of an array has the number of the whole array.
    itself = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if several else '"$SLURM_JOB_ID"'
    options = [
        f"--job-name={NAME.value}",
        f"--time={TIME.value}",
        *([f"--partition={PARTITION.value}"] if PARTITION.value else []),
        *([f"--account={ACCOUNT.value}"] if ACCOUNT.value else []),
        f"--nodes={NODES.value}",
        f"--ntasks-per-node={GPUS.value or 1}",
        *([f"--gpus-per-node={GPUS.value}"] if GPUS.value else []),
        *([f"--cpus-per-task={CPUS.value}"] if CPUS.value else []),
        *([f"--array=0-{ARRAY.value - 1}"] if several else []),
        f"--output={NAME.value}-{'%A_%a' if several else '%j'}.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{SIGNAL_SECONDS}",
    ]
    # srun makes SIGKILL of a SIGTERM of its own, so the processes get theirs from scancel, which leaves this script alone.
    cpus = f" --cpus-per-task={CPUS.value}" if CPUS.value else ""
    return (
        "#!/bin/bash\n"
        + "".join(f"#SBATCH {option}\n" for option in options)
        + f"""
export PATH={shlex.quote(os.path.dirname(sys.executable))}:"$PATH" PYTHONUNBUFFERED=1
stopped=
trap 'stopped=1; echo "time is nearly over: saving, then queued again"; scancel --signal=TERM {itself}' USR1
srun --kill-on-bad-exit=1{cpus} {line} &
job=$!
{job.WAIT}if [[ $stopped ]]; then scontrol requeue {itself}; fi
exit "$code"
"""
    )


def main(argv: list[str]) -> int:
    _, command = job.parse(argv, __doc__)
    _check_flags()
    wanted = job.check(command, ARRAY.value)
    job.check_tasks(wanted, ARRAY.value)
    if wanted.name == "train" and not wanted.value("workdir"):
        raise ConfigError("give the trainer a --workdir on a file system that all nodes see, from where it goes on when it is queued again")
    if not DRY_RUN.value:
        shell.need("sbatch")
    text = script(job.shell_line(wanted, "SLURM_ARRAY_TASK_ID", ARRAY.value))
    submit = ["sbatch", "--parsable"]
    if DRY_RUN.value:
        shell.show(submit, text)
        return 0
    number = shell.do(submit, "sbatch did not take the job", text).strip().split(";")[0]
    log = f"{NAME.value}-{number}{'_*' if ARRAY.value > 1 else ''}.log"
    print(f"job {number} is queued, until it is done or cancelled\n  how it is:  squeue --job={number}")
    print(f"  follow it:  tail -F {log}\n  stop it:    scancel {number}")
    return 0


def _check_flags() -> None:
    for flag in (NAME, TIME):
        if not flag.value:
            raise ConfigError(f"give --{flag.name}")
    if not re.fullmatch(r"[\w.-]+", NAME.value):
        raise ConfigError(f"--name={NAME.value}: letters, digits, ., _ and -")
    for flag in (PARTITION, ACCOUNT):
        if flag.value and not re.fullmatch(r"[\w.,@-]+", flag.value):
            raise ConfigError(f"--{flag.name}={flag.value!r} is not the name of one")
    if not re.fullmatch(r"\d+-\d+(:\d\d){0,2}|\d+(:\d\d){0,2}", TIME.value):
        raise ConfigError(f"--time={TIME.value} is not a time that SLURM reads: MINUTES, HOURS:MM:SS or DAYS-HOURS:MM:SS")
    if ARRAY.value < 1:
        raise ConfigError(f"--array={ARRAY.value}: at least one task")
    if seconds(TIME.value) <= 2 * SIGNAL_SECONDS:
        raise ConfigError(f"--time={TIME.value} is too short: the job is asked to save {SIGNAL_SECONDS // 60} minutes before it is over")


def seconds(time: str) -> int:
    """Of a time as SLURM reads it: MINUTES[:SS], HOURS:MM:SS, DAYS-HOURS[:MM[:SS]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, rest_seconds = (*parts, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + rest_seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv)))
