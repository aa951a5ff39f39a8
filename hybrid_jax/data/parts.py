"""Parts of a token store: what became of one unit of the input, in the store's folder under parts/, with a record of it.

parts/tokens/PART/SPLIT.KIND.N   block N of the part's tokens, or of the lengths of its documents
parts/records/PART.json          what the part is of and holds; written last, so that it is the part's being there

PART is a hash of the unit, so that two processes that make the same one write the same bytes: neither can harm the other, and
no lock is needed, which a bucket does not have.
"""

import hashlib
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts

from hybrid_jax.data import DataError
from hybrid_jax.data.documents import Unit
from hybrid_jax.data.folders import below
from hybrid_jax.data.inputs import File

SPLITS = ("train", "validation")
COUNTS = ("tokens", "documents", "bytes")
BLOCK_BYTES = 1 << 24  # what is held of a part before it is written
AHEAD = 4  # blocks read before they are asked for
AGAIN = "delete parts/ in the folder of the store and run the same command again"


class Gone(DataError):
    """A part that was there is not: something is wrong, unless another process has finished the store and tidied up."""


def name_of(unit: Unit) -> str:
    """A name for exactly this input: parts of files that were mended after an error are made again, the others kept."""
    return hashlib.sha256(json.dumps([unit.files, unit.start, unit.stop]).encode()).hexdigest()[:32]


def finished(folder: ts.KvStore) -> set[str]:
    """The names of the parts that are whole."""
    keys = folder.list(below("parts/records/"), strip_prefix_length=len("parts/records/")).result()
    return {key.decode().removesuffix(".json") for key in keys}


class Writer:
    """Writes one part. Give it documents with ``add``, then ``close`` it."""

    def __init__(self, folder: ts.KvStore, unit: Unit):
        self.folder, self.unit = folder, unit
        self._held, self._held_bytes = {split: [] for split in SPLITS}, 0
        self._writes = []  # under way, while the next block is made
        self._blocks = []  # of each block, in the order they are written: the bytes and the checksum of every array
        self._counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}

    def add(self, split: str, tokens: np.ndarray, size: int) -> None:
        """A document of ``size`` bytes; its ``tokens`` include its end."""
        self._held[split].append(tokens)
        for name, more in ("tokens", len(tokens)), ("documents", 1), ("bytes", size):
            self._counts[split][name] += more
        self._held_bytes += tokens.nbytes
        if self._held_bytes >= BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        contents = {}
        for split, documents in self._held.items():
            if documents:
                contents[f"{split}.tokens"] = b"".join(documents)
                contents[f"{split}.lengths"] = np.array([len(tokens) for tokens in documents], np.int64).tobytes()
        part = f"parts/tokens/{name_of(self.unit)}"
        self._wait()
        self._writes = [self.folder.write(f"{part}/{name}.{len(self._blocks)}", content) for name, content in contents.items()]
        self._blocks.append({name: [len(content), zlib.crc32(content)] for name, content in contents.items()})
        self._held, self._held_bytes = {split: [] for split in SPLITS}, 0

    def _wait(self) -> None:
        for write in self._writes:
            write.result()

    def close(self) -> None:
        """Write what is left, and when all is written the record."""
        if self._held_bytes:
            self._flush()
        self._wait()
        unit = {"files": self.unit.files, "start": self.unit.start, "stop": self.unit.stop, "end": self.unit.end}
        record = {**unit, "splits": self._counts, "blocks": self._blocks}
        self.folder.write(f"parts/records/{name_of(self.unit)}.json", json.dumps(record)).result()


def read_records(folder: ts.KvStore, names: list[str]) -> list[dict]:
    """The records of the parts ``names``. Raises `Gone` where one is not there."""
    return [json.loads(content) for content in _ahead(lambda name: _read(folder, f"parts/records/{name}.json"), names, 16)]


def _read(folder: ts.KvStore, key: str) -> bytes:
    read = folder.read(key).result()
    if read.state != "value":
        raise Gone(f"{key} is not there any more: {AGAIN}")
    return read.value


def check_records(records: list[dict], files: list[File]) -> None:
    """Raise `DataError` unless the ``records`` are of exactly these ``files``: each as it is now, every piece of it once."""
    now, held = {file.path: file for file in files}, {}
    for record in records:
        for path, *stamp in record["files"]:
            if path not in now:
                raise DataError(f"{path} was read for the store and is not there any more: put it back, or begin in an empty folder")
            if stamp != list(now[path][1:]):
                raise DataError(f"{path} was changed while the store was built: run the same command again")
            held.setdefault(path, []).append((record["start"], record["stop"], record["end"]))
    for path in now:
        if path not in held:
            raise DataError(f"{path} is new since the store was begun: run the same command again")
        pieces = sorted(held[path])
        for (_, stop, _), (start, _, _) in zip([(0, 0, 0), *pieces], [*pieces, (pieces[-1][2], 0, 0)], strict=True):
            if start != stop:
                what = "missing" if start > stop else "twice"
                raise DataError(f"{path} is {what} in the parts of the store, from {min(start, stop)} to {max(start, stop)}: {AGAIN}")


def read_array(folder: ts.KvStore, names: list[str], records: list[dict], array: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The ``array`` ("train.tokens", ...) of all parts in a row, in blocks as they were written.

    Raises `Gone` where one is not there, `DataError` where one is not what its record says.
    """

    def read(block):
        key, files, (size, checksum) = block
        content = _read(folder, key)
        if len(content) != size or zlib.crc32(content) != checksum:
            raise DataError(f"{key}, made of {files[0][0]}, is damaged: {AGAIN}")
        return np.frombuffer(content, dtype)

    blocks = [
        (f"parts/tokens/{name}/{array}.{number}", record["files"], held[array])
        for name, record in zip(names, records, strict=True)
        for number, held in enumerate(record["blocks"])
        if array in held
    ]
    return _ahead(read, blocks, AHEAD)


def _ahead(function: Callable[[Any], Any], arguments: Iterable, ahead: int) -> Iterator:
    """``map`` with the next ``ahead`` results under way in threads."""
    with ThreadPoolExecutor(ahead) as pool:
        waiting = deque()
        try:
            for argument in arguments:
                waiting.append(pool.submit(function, argument))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
