"""Buckets of Cloud Storage: that they are there, and one with the code in it, which the containers of an array of tasks mount."""

import tempfile
from pathlib import Path

from hybrid_jax.config import ConfigError
from launch import code, job, shell
from launch.gcloud import describe_bucket

MOUNTED = "/mnt/disks/code"  # where the containers see the folder of the code


def check(bucket: str, project: str | None = None, region: str | None = None) -> None:
    """Raises ConfigError where Google Cloud does not show ``bucket``; a note where it is not in ``region``."""
    described = shell.ask(describe_bucket(bucket, project))
    if described.returncode:
        make = f"gcloud storage buckets create gs://{bucket} --location={region or 'REGION'}"
        raise ConfigError(f"gs://{bucket} can not be reached: {shell.reason(described)}; nothing was created. To make it: {make}")
    if region and (location := described.stdout.strip().lower()) != region:
        print(f"note: gs://{bucket} is in {location}, the machines in {region}: reading and writing is slower, and may cost", flush=True)


def split(folder: str) -> tuple[str, str]:
    """The bucket of ``--code=folder`` and the path in it. Raises ConfigError where it is not in a bucket."""
    bucket, _, path = folder.removeprefix("gs://").partition("/")
    if not folder.startswith("gs://") or not bucket:
        raise ConfigError(f"--code={folder} is not a folder of a bucket, gs://BUCKET/FOLDER")
    return bucket, path.strip("/")


def needed(folder: str, results: str | None) -> list[str]:
    """The buckets of ``--code=folder`` and of the results, if they go to one."""
    return list(dict.fromkeys(filter(None, (split(folder)[0], results))))


def upload(bundle: str, folder: str, name: str, project: str | None = None) -> list[str]:
    """Copies the archive ``bundle`` to where the tasks of ``name`` read it."""
    return ["gcloud", "storage", "cp", bundle, f"{folder.rstrip('/')}/{name}.tar.gz", *([f"--project={project}"] if project else [])]


def copy_code(checkout: Path, folder: str, name: str, project: str | None = None) -> None:
    """Pack what git tracks of ``checkout`` and copy it. Raises RunError where that fails."""
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Path(temporary) / f"{name}.tar.gz"
        code.pack(checkout, bundle, {})
        shell.do(upload(str(bundle), folder, name, project), f"the code could not be copied to {folder}; nothing was started")


def script(line: str, name: str) -> str:
    """What the container of each task of ``name`` runs: ``line``, in the code that is mounted."""
    before = f"set -e\nmkdir /work\ntar -xzf {MOUNTED}/{name}.tar.gz -C /work\ncd /work/code\npip install --quiet .\nset +e\n"
    return job.script(line, before + "export PYTHONUNBUFFERED=1\n")
