"""Documents out of files: .txt (one a file), .jsonl (plain, .gz, .zst) and .parquet, in units of work of a bounded size.

Everything streams: what is held is a document, not a file. An error names the file and the line, and what to do.
"""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hybrid_jax.data import DataError, inputs
from hybrid_jax.data.inputs import File

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
UNIT_BYTES = 1 << 25  # of text, about: what a kill can lose, for each worker
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Unit:
    """A part of the input that one worker turns into one part of the store.

    Attributes:
        files: one; or several, of .txt files.
        start, stop: bytes of a plain .jsonl (the lines that begin there), row groups of a .parquet; 0 and 1 of the others.
        end: what ``stop`` is in the last unit of the file.
        size: bytes of input, for the progress bar.
    """

    files: tuple[File, ...]
    start: int
    stop: int
    end: int
    size: int


def find_files(names: list[str]) -> list[File]:
    """The files that ``names`` (files, folders, globs; local or in a bucket) stand for, each once, in the order of their paths.

    Raises `DataError` for a name that stands for none, and for a file of an unknown kind that is named outright.
    """
    found = {}
    for name in names:
        files = inputs.find(name, SUFFIXES)
        if not files:
            raise DataError(f"--input={name} names no file: give files, globs, or folders with {', '.join(SUFFIXES)} files")
        for file in files:
            if not file.path.endswith(SUFFIXES):
                raise DataError(f"{file.path} is of an unknown kind: give {', '.join(SUFFIXES)} files")
            found[file.path if "://" in file.path else os.path.realpath(file.path)] = file
    return sorted(found.values())


def plan_units(files: list[File], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """``files`` cut or put together into units of about ``unit_bytes``; the documents of all units in a row are those of the files.

    Each file is in at least one unit, and the plan depends on nothing but the files. Raises `DataError` for a Parquet file that
    cannot be read.
    """
    parquet = [file for file in files if file.path.endswith(".parquet")]
    with ThreadPoolExecutor(16) as pool:  # in a bucket each waits for its answers
        groups = dict(zip(parquet, pool.map(_group_bytes, parquet), strict=True))
    units, texts, texts_size = [], [], 0

    def close_texts():
        nonlocal texts, texts_size
        if texts:
            units.append(Unit(tuple(texts), 0, 1, 1, texts_size))
        texts, texts_size = [], 0

    for file in files:
        if file.path.endswith(".txt"):
            texts.append(file)
            texts_size += file.size
            if texts_size >= unit_bytes or len(texts) == 1000:
                close_texts()
            continue
        close_texts()
        if file.path.endswith(".jsonl"):
            cuts = [*range(0, max(file.size, 1), unit_bytes), file.size]
            units += [Unit((file,), start, stop, file.size, stop - start) for start, stop in itertools.pairwise(cuts)]
        elif file.path.endswith(".parquet"):
            units += _parquet_units(file, groups[file], unit_bytes)
        else:
            units.append(Unit((file,), 0, 1, 1, file.size))  # a compressed stream cannot be entered in the middle
    close_texts()
    return units


def _group_bytes(file: File) -> list[int]:
    metadata = _open_parquet(file).metadata
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def _parquet_units(file: File, groups: list[int], unit_bytes: int) -> list[Unit]:
    total, end, units, start, held = sum(groups), len(groups), [], 0, 0
    for group, group_bytes in enumerate(groups):
        held += group_bytes
        if held >= unit_bytes or group == end - 1:
            units.append(Unit((file,), start, group + 1, end, round(file.size * held / max(total, 1))))
            start, held = group + 1, 0
    return units or [Unit((file,), 0, 0, 0, file.size)]


def read_documents(unit: Unit, text_field: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """The documents of ``unit`` and, for messages, a function that says where each is.

    Raises `DataError` at text that is not UTF-8, a line that is not JSON, a record without its text, a damaged file.
    """
    path = unit.files[0].path
    if path.endswith(".txt"):
        return _read_texts(unit)
    if path.endswith(".parquet"):
        return _read_parquet(unit, text_field)
    return _read_jsonl(unit, text_field)


def _read_texts(unit: Unit):
    for file in unit.files:
        with inputs.open_file(file) as stream:
            content = stream.read()
        try:
            yield content.decode(), lambda file=file: file.path
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            where = f"{file.path}, line {line}"
            raise DataError(f"{where}: not UTF-8 text ({error.reason}): convert the file to UTF-8 or leave it out") from None


def _read_jsonl(unit: Unit, text_field: str):
    (file,) = unit.files
    compression = next((kind for suffix, kind in COMPRESSIONS.items() if file.path.endswith(suffix)), None)
    lines = _compressed_lines(file, compression) if compression else _plain_lines(file, unit.start, unit.stop)
    for line, where in lines:
        if line.isspace():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{where()}: not UTF-8 text ({error.reason}): mend or remove the line") from None
        except ValueError as error:
            raise DataError(f"{where()}: not JSON ({error}): mend or remove the line") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            held = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
            raise DataError(f"{where()}: no text under {text_field!r}, {held}: name the field that holds it (--text_field=NAME)")
        yield record[text_field], where


def _plain_lines(file: File, start: int, stop: int):
    with inputs.open_file(file) as stream:
        if start:
            stream.seek(start - 1)
            stream.readline()  # the rest of the line that began in the unit before
        position = stream.tell()
        while position < stop:
            line = stream.readline()
            yield line, lambda position=position: f"{file.path}, line {_line_number(file, position)}"
            position += len(line)


def _line_number(file: File, position: int) -> int:
    with inputs.open_file(file) as stream:
        blocks = iter(lambda: stream.read(min(1 << 20, position - stream.tell())), b"")
        return 1 + sum(block.count(b"\n") for block in blocks)


def _compressed_lines(file: File, compression: str):
    import pyarrow  # unlike gzip and zstandard, one reader for both that tells a file cut short from one that ends

    number = 0
    try:
        with io.BufferedReader(pyarrow.input_stream(_for_arrow(file), compression=compression), inputs.BUFFER) as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007 (used in the message below)
                yield line, lambda number=number: f"{file.path}, line {number}"
    except OSError as error:
        raise DataError(f"{file.path}, after line {number}: damaged or cut short ({error}): get the file again") from None


def _for_arrow(file: File):
    return inputs.open_raw(file) if "://" in file.path else file.path  # the latter it reads without Python


def _open_parquet(file: File):
    import pyarrow.parquet

    with readable_parquet(file.path):
        # Buffered column by column, not before: so that memory does not follow row groups.
        return pyarrow.parquet.ParquetFile(_for_arrow(file), buffer_size=inputs.BUFFER, pre_buffer=False)


@contextlib.contextmanager
def readable_parquet(file: str | os.PathLike):
    """Raises DataError where ``file``, which is read inside, is no Parquet file or a damaged one."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file ({error}): get the file again") from None


def _read_parquet(unit: Unit, text_field: str):
    import pyarrow

    if unit.start == unit.stop:
        return  # a table without rows need not know that its column is text
    (file,) = unit.files
    parquet = _open_parquet(file)
    schema, remedy = parquet.schema_arrow, "name the column that holds text (--text_field=NAME)"
    if text_field not in schema.names:
        raise DataError(f"{file.path} has no column {text_field!r}, it has {', '.join(map(repr, schema.names))}: {remedy}")
    if schema.field(text_field).type not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise DataError(f"{file.path}: column {text_field!r} holds {schema.field(text_field).type}, not text: {remedy}")
    number = sum(parquet.metadata.row_group(group).num_rows for group in range(unit.start))
    try:
        for batch in parquet.iter_batches(64, row_groups=range(unit.start, unit.stop), columns=[text_field]):
            for content in batch.column(0).cast(pyarrow.large_binary()):
                number += 1
                yield _decode_row(content.as_py(), file.path, number), lambda number=number: f"{file.path}, row {number}"
    except OSError as error:
        raise DataError(f"{file.path}, after row {number}: damaged ({error}): get the file again") from None


def _decode_row(content: bytes | None, path: str, number: int) -> str:
    if content is None:
        raise DataError(f"{path}, row {number}: the text is null: remove the row")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {number}: not UTF-8 text ({error.reason}): mend or remove the row") from None
