"""The command that a launcher starts somewhere else, checked here before a machine is paid for.

It is given after ``--`` as it is typed on this machine: ``python -m launch.tpu_vm run ... -- python -m experiments.train --config=...``
"""

import difflib
import re
import shlex
from typing import NamedTuple

from experiments import cli
from hybrid_jax.config import ConfigError
from launch import command_flags

# Where a command leaves what is worth keeping: not on a machine that is gone when the command is done. None: it is what it prints.
RESULT_FLAGS = {"train": "workdir", "tokenize": "output", "eval": "workdir", "bench": None}


class Job(NamedTuple):
    name: str  # "train"
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        return ["python", "-m", f"experiments.{self.name}", *self.arguments]

    def value(self, flag: str) -> str | None:
        """What ``--flag=`` is given as; None if it is not."""
        found = [match[1] for argument in self.arguments if (match := re.match(rf"--?{flag}=(.*)", argument, re.DOTALL))]
        return found[-1] if found else None


def parse(argv: list[str], doc: str, verbs: tuple[str, ...] = ()) -> tuple[str | None, list[str]]:
    """Parse a launcher's own flags; what it is to do, one of ``verbs``, if it has any, and the command after ``--``."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, command, verb = argv[:at], argv[at + 1 :], None
    if verbs and "--help" not in own and "-h" not in own:
        if len(own) < 2 or own[1] not in verbs:
            raise ConfigError(f"say what to do first: {', '.join(verbs)} (got {own[1] if len(own) > 1 else 'nothing'})")
        verb = own.pop(1)
    if any(re.match(r"--?(config|workdir|step)([.=]|$)", argument) for argument in own):
        raise ConfigError("--config, --workdir and --step belong to the command, after --")
    cli.parse(own, doc)
    return verb, command


def check_name(name: str, longest: int = 40) -> None:
    """Raises ConfigError where Google Cloud would not take ``name``."""
    if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{longest - 2}}}[a-z0-9])?", name):
        raise ConfigError(f"--name={name}: small letters, digits and -, beginning with a letter, at most {longest}")


def check(command: list[str], tasks: int | None = None) -> Job:
    """The job that ``command`` starts. Raises ConfigError for whatever can be known to be wrong with it here.

    tasks: how many there are where it is an array of them, as in :func:`shell_line`; its flags are checked as the first one is given them.
    """
    if len(command) < 3 or command[0] not in ("python", "python3") or command[1] != "-m" or not command[2].startswith("experiments."):
        got = shlex.join(command) or "nothing"
        raise ConfigError(
            f"give the command to start after --, such as -- python -m experiments.train --config=configs/gla_r6.py (got {got})"
        )
    job = Job(command[2].removeprefix("experiments."), tuple(cli.joined(command[3:])))
    known = sorted(file.stem for file in cli.PACKAGE.glob("*.py") if "__main__" in file.read_text())
    if job.name not in known:
        close = difflib.get_close_matches(job.name, known, n=1)
        hint = f"did you mean experiments.{close[0]}?" if close else f"there are {', '.join(known)}"
        raise ConfigError(f"there is no command experiments.{job.name}; {hint}")
    if any("\n" in argument for argument in job.arguments):
        raise ConfigError("an argument of the command has a line break in it: put it into a configuration file")
    _check_flags(job, tasks)
    config = [argument for argument in job.arguments if re.match("--?config([.=]|$)", argument)]
    if job.value("config") is not None:
        cli.load_run(config, shlex.join(job.command))
    return job


def _check_flags(job: Job, tasks: int | None) -> None:
    for argument in job.arguments:
        if argument in ("--help", "-h"):
            raise ConfigError(f"what experiments.{job.name} takes is told here: python -m experiments.{job.name} --help")
        if not re.match(r"--?\w", argument):
            raise ConfigError(f"unexpected {argument!r}; values are given as --name=value")
    given = job.arguments
    if tasks is not None:  # the first of them
        given = tuple(argument.replace("{task}", "0").replace("{tasks}", str(tasks)) for argument in given)
    if said := command_flags.mistakes(f"experiments.{job.name}", given)[0]:
        raise ConfigError(f"experiments.{job.name}: {said}")


def check_results_outlive(job: Job) -> str | None:
    """The bucket that the job writes to, None if it writes to none. Raises ConfigError if its results would go with the machines."""
    if job.name not in RESULT_FLAGS:
        raise ConfigError(
            f"what experiments.{job.name} writes would be deleted with the machines, and it does not write to buckets; "
            f"what can be started there: {', '.join(f'experiments.{name}' for name in RESULT_FLAGS)}"
        )
    flag = RESULT_FLAGS[job.name]
    if flag is None:
        return None
    path = job.value(flag) or ""
    match = re.match(r"gs://([^/]+)", path)
    if not match:
        raise ConfigError(
            f"experiments.{job.name} would write to {path or 'a folder'} on machines that are deleted at the end, and could not go on "
            f"from there after a preemption: give --{flag}=gs://BUCKET/FOLDER"
        )
    return match[1]


def shell_line(job: Job, task_variable: str | None = None, tasks: int | None = None) -> str:
    """The command as a line of bash.

    In a job of several tasks ``{task}`` stands for each one's number, from 0, which ``task_variable`` holds; ``{tasks}`` for their count.
    """
    if task_variable is None:
        return shlex.join(job.command)
    words = []
    for argument in job.command:
        pieces = argument.replace("{tasks}", str(tasks)).split("{task}")
        words.append(f'"${task_variable}"'.join(shlex.quote(piece) if piece else "" for piece in pieces) or "''")
    return " ".join(words)


def check_tasks(job: Job, tasks: int) -> None:
    """Raises ConfigError where ``tasks`` tasks would all do the same."""
    if tasks > 1 and not any("{task}" in argument for argument in job.arguments):
        raise ConfigError(f"all {tasks} tasks would do the same: say which part each does, such as '--shard={{task}}/{{tasks}}'")


# Bash: wait for ``$job``, whatever signals come meanwhile; its status is in ``code``.
WAIT = """\
while wait "$job"; kill -0 "$job" 2>/dev/null; do :; done  # a signal ends wait before the command ends
wait "$job"  # says again how it ended
code=$?
"""


def script(line: str, before: str = "", after: str = "") -> str:
    """A bash script that runs ``line``, passes on SIGTERM to it, and exits as it does."""
    return f"""#!/bin/bash
{before}trap 'kill -TERM "$job" 2>/dev/null' TERM
{line} &
job=$!
{WAIT}{after}exit "$code"
"""
