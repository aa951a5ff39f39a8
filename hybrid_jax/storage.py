"""Folders and files, on a file system or in a bucket of Cloud Storage, read and written alike."""

import fnmatch
import importlib.util
import os

import fsspec
from etils import epath

from hybrid_jax.config import ConfigError


def run_folder(path: str | os.PathLike) -> epath.Path:
    """``path`` as a folder of a run: of a file system, or of a bucket of Cloud Storage (gs://BUCKET/FOLDER), read and written alike.

    Raises ConfigError for storage of another kind, a bucket that cannot be read, or where what gs:// needs is not installed.
    """
    kind, in_storage, name = os.fspath(path).partition("://")
    if not in_storage:
        return epath.Path(path)
    bucket = name.partition("/")[0]
    if kind != "gs" or not bucket:
        raise ConfigError(f"{path} cannot hold a run: give a folder, or gs://BUCKET/FOLDER in a bucket of Cloud Storage")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"{path} is in a bucket, and gcsfs, which reads and writes it, is not installed: pip install -e '.[gcs]'")
    os.environ.setdefault("EPATH_USE_TF", "false")  # gcsfs also where TensorFlow is installed
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other processes and TensorStore write there too
    try:
        epath.Path(f"gs://{bucket}").stat()
    except FileNotFoundError:
        raise ConfigError(f"there is no bucket gs://{bucket}, or you may not see it: make it, or give another folder than {path}") from None
    except Exception as error:  # Cloud Storage, the network and Google's credentials each have their own
        raise ConfigError(
            f"gs://{bucket} cannot be read ({one_line(error)}); with your own credentials: gcloud auth application-default login"
        ) from None
    return epath.Path(path)


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether ``path`` is in a bucket, whose files are written whole or not at all: they cannot be appended to."""
    return os.fspath(path).startswith("gs://")


def files(parent: epath.Path, pattern: str) -> list[epath.Path]:
    """What in ``parent`` has a name that matches ``pattern``, sorted; nothing where there is no such folder.

    A bucket's own ``glob`` would list all objects below it, a run's checkpoints with all their parts.
    """
    try:
        return sorted(path for path in parent.iterdir() if fnmatch.fnmatch(path.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


def one_line(error: BaseException) -> str:
    """What an error says, or what kind it is."""
    return " ".join(str(error).split()) or type(error).__name__


def write_whole(file: epath.Path, text: str) -> None:
    """Write ``file`` so that whoever reads it finds the old text or the new one."""
    if in_bucket(file):
        file.write_text(text)
    else:
        new = file.with_name(f".{file.name}.{os.getpid()}")  # a name that nobody looks for
        new.write_text(text)
        new.replace(file)
