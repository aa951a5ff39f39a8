"""Folders on a disk or in a bucket, both through TensorStore: a read or write of one file is whole or did not happen."""

import re
import shutil
from pathlib import Path

import tensorstore as ts

CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})  # so that reads of one chunk in a row fetch it once


def folder_url(location) -> str:
    """``location`` as a TensorStore URL of a folder: itself if it names its kind (gs://, s3://, ...), else a local path's."""
    location = str(location)
    return (location if "://" in location else Path(location).absolute().as_uri()).rstrip("/") + "/"


def open_folder(location) -> ts.KvStore:
    """The files below ``location``, there yet or not, by their names from there on. Nothing is read or written."""
    return ts.KvStore.open(folder_url(location), context=CONTEXT).result()


def below(prefix: str) -> ts.KvStore.KeyRange:
    """The keys that begin with ``prefix``."""
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def remove_folder(location, name: str) -> None:
    """Delete the folder ``name`` in ``location`` with all that is in it."""
    if "://" in str(location):
        open_folder(location).delete_range(below(f"{name}/")).result()
    else:
        shutil.rmtree(Path(location) / name, ignore_errors=True)  # TensorStore would leave the empty folders


def reason(error: Exception) -> str:
    """What a file system said, in one line without what its client did about it."""
    return " ".join(re.split(r" error_info=| \[", str(error))[0].split())
