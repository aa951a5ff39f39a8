"""The files that a store is built from, on a disk or in a bucket (gs://, s3://).

Arrow lists a bucket, since TensorStore does not tell sizes; TensorStore reads it, since Arrow keeps Python waiting while it does.
"""

import glob
import io
import os
import re
from typing import BinaryIO, NamedTuple

from hybrid_jax.data import DataError
from hybrid_jax.data.folders import open_folder, reason

BUFFER = 1 << 22  # bytes read at once: tokenizing them takes far longer than a bucket takes to answer


class File(NamedTuple):
    """A file as it was when it was found: one that is written again has another time.

    Attributes:
        path: absolute, or a URL.
        size: bytes.
        modified: nanoseconds, as its file system counts them.
    """

    path: str
    size: int
    modified: int


def find(name: str, suffixes: tuple[str, ...]) -> list[File]:
    """The files that ``name`` stands for: itself, those of a glob, or all below a folder that end with one of ``suffixes``.

    Empty if there are none. Raises `DataError` where a bucket cannot be read.
    """
    if "://" in name:
        return _find_in_bucket(name, suffixes)
    if os.path.isdir(name):
        below = [os.path.join(parent, file) for parent, _, files in os.walk(name) for file in files]
        paths = [path for path in below if path.endswith(suffixes)]
    else:
        paths = [name] if os.path.isfile(name) else [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
    return [File(os.path.abspath(path), (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in paths]


def _find_in_bucket(name: str, suffixes: tuple[str, ...]) -> list[File]:
    from pyarrow.fs import FileSelector, FileType

    scheme, _, path = name.rstrip("/").partition("://")
    fixed = re.match(r"[^*?[]*(?=/.*[*?[])|[^*?[]*$", path)  # the folders before the first step with a * in it, or all
    if not fixed:
        raise DataError(f"--input={name}: a bucket cannot be a glob: name it")
    filesystem, root = _locate(f"{scheme}://{fixed[0]}")
    try:
        found = [] if fixed[0] != path else [info for info in filesystem.get_file_info([root]) if info.type == FileType.File]
        infos = found or filesystem.get_file_info(FileSelector(root, allow_not_found=True, recursive=True))
    except (OSError, ValueError) as error:  # Arrow raises both
        raise DataError(f"cannot read {name}: {reason(error)}: check the address and your right to read it") from None
    if not found:
        wanted = re.compile(_glob_pattern(path) if fixed[0] != path else ".*(" + "|".join(map(re.escape, suffixes)) + ")", re.DOTALL)
        found = [info for info in infos if info.type == FileType.File and wanted.fullmatch(info.path)]
    return [File(f"{scheme}://{info.path}", info.size, info.mtime_ns) for info in found]


def _glob_pattern(path: str) -> str:
    """The regular expression of a glob, in which ** is any number of folders and nothing else crosses a /."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]+\]|.", path)
    return "".join(pieces.get(token) or (token.replace("[!", "[^") if len(token) > 1 else re.escape(token)) for token in tokens)


def _locate(path: str):
    """The file system of the URL ``path`` and its path there."""
    from pyarrow.fs import FileSystem, GcsFileSystem

    scheme, _, rest = path.partition("://")
    if scheme == "gs":
        return GcsFileSystem(), rest  # from_uri would decode the % in a name
    try:
        return FileSystem.from_uri(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {reason(error)}: give a local path, or a URL of gs:// or s3://") from None


def open_file(file: File) -> BinaryIO:
    """``file`` to be read from any position, buffered."""
    return io.BufferedReader(open_raw(file), BUFFER)


def open_raw(file: File) -> io.RawIOBase:
    """``file`` to be read from any position."""
    return _Object(file) if "://" in file.path else open(file.path, "rb", buffering=0)


class _Object(io.RawIOBase):
    """A file of a bucket, read in ranges. Raises `DataError` where it cannot be, or is written anew in the meantime."""

    def __init__(self, file: File):
        scheme, _, place = file.path.partition("://")
        bucket, _, self._key = place.partition("/")  # of which the % in a name need not be escaped
        self._bucket, self._file, self._position, self._generation = open_folder(f"{scheme}://{bucket}"), file, 0, None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._file.size)[whence]
        return self._position

    def readinto(self, buffer) -> int:
        size = min(len(buffer), self._file.size - self._position)
        if size <= 0:
            return 0
        try:
            read = self._bucket.read(self._key, byte_range=slice(self._position, self._position + size)).result()
        except ValueError as error:
            raise DataError(f"cannot read {self._file.path}: {reason(error)}: check your right to read it") from None
        if read.state != "value" or self._generation not in (None, read.stamp.generation):
            raise DataError(f"{self._file.path} was changed or removed while it was read: run the same command again")
        self._generation = read.stamp.generation
        buffer[:size] = read.value
        self._position += size
        return size
