"""What it takes to start an array of tasks, whoever runs them: flags, what is checked, and the code in a bucket that they mount."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from absl import flags

from hybrid_jax.config import ConfigError
from launch import buckets, code, job, shell
from launch.gcloud import describe_bucket

NAME = flags.DEFINE_string("name", None, "Name of the job: small letters, digits and -.")
TASKS = flags.DEFINE_integer(
    "tasks", 1, "How many tasks. In the command {task} stands for the number of each, from 0, and {tasks} for their count.", lower_bound=1
)
SPOT = flags.DEFINE_bool("spot", False, "Spare capacity: cheaper, and taken away when wanted elsewhere.")
CODE = flags.DEFINE_string("code", None, "Folder that the code is copied to for the tasks to read: gs://BUCKET/FOLDER.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print every command, and run none.")

MOUNTED = "/mnt/disks/code"  # where the containers see the folder of the code
RETRIES = 3  # of a task that failed


class Array(NamedTuple):
    """One that is right, as far as can be known before anything is created."""

    line: str  # of bash, that each task runs
    buckets: list[str]  # of the code and, if they go to one, of the results
    checkout: Path

    def show_buckets(self, project: str | None = None) -> None:
        """Print what :meth:`check_buckets` would run."""
        for each in self.buckets:
            shell.show(describe_bucket(each, project))

    def check_buckets(self, project: str | None = None, region: str | None = None) -> None:
        """As `buckets.check`."""
        for each in self.buckets:
            buckets.check(each, project, region)

    def copy_code(self, project: str | None = None) -> None:
        """Pack what git tracks and copy it to where the tasks read it. Raises RunError where that fails."""
        with tempfile.TemporaryDirectory() as temporary:
            bundle = Path(temporary) / f"{NAME.value}.tar.gz"
            code.pack(self.checkout, bundle, {})
            shell.do(upload(str(bundle), project), f"the code could not be copied to {CODE.value}; nothing was started")


def check(argv: list[str], doc: str, needed: Mapping[str, str], tools: list[str], task_variable: str, longest: int) -> Array:
    """The array that a command line asks for.

    needed: names of the launcher's own flags without which it cannot be, and what to say of each. longest: letters of --name.
    task_variable: of the environment, where a task finds its number. Raises ConfigError for what is missing or wrong.
    """
    _, command = job.parse(argv, doc)
    for flag, hint in {"name": "", **needed, "code": ""}.items():
        if not flags.FLAGS[flag].value:
            raise ConfigError(f"give --{flag}{hint}")
    job.check_name(NAME.value, longest)
    bucket, _ = split()
    wanted = job.check(command, TASKS.value)
    job.check_tasks(wanted, TASKS.value)
    results = job.check_results_outlive(wanted)
    checkout = code.root()
    code.check_config(checkout, wanted.value("config"))
    if not DRY_RUN.value:
        shell.need(*tools)
    code.note_left_behind(checkout)
    used = list(dict.fromkeys(filter(None, (bucket, results))))
    return Array(job.shell_line(wanted, task_variable, TASKS.value), used, checkout)


def split() -> tuple[str, str]:
    """The bucket of ``--code`` and the path in it. Raises ConfigError where it is not in a bucket."""
    bucket, _, path = CODE.value.removeprefix("gs://").partition("/")
    if not CODE.value.startswith("gs://") or not bucket:
        raise ConfigError(f"--code={CODE.value} is not a folder of a bucket, gs://BUCKET/FOLDER")
    return bucket, path.strip("/")


def upload(bundle: str, project: str | None = None) -> list[str]:
    """Copies the archive ``bundle`` to where the tasks read it."""
    to = f"{CODE.value.rstrip('/')}/{NAME.value}.tar.gz"
    return ["gcloud", "storage", "cp", bundle, to, *([f"--project={project}"] if project else [])]


def script(line: str) -> str:
    """What the container of each task runs: ``line``, in the code that is mounted."""
    before = f"set -e\nmkdir /work\ntar -xzf {MOUNTED}/{NAME.value}.tar.gz -C /work\ncd /work/code\npip install --quiet .\nset +e\n"
    return job.script(line, before + "export PYTHONUNBUFFERED=1\n")
