"""Build a token store from text, in parallel, on any number of machines, and so that a kill loses no document and doubles none.

The input is cut into units in an order that depends on the input alone. A worker writes the tokens of its unit as a part
(`hybrid_jax.data.parts`), which is either there or not; run again, only the parts that are not there are made. Whoever finds
all of them there lays them end to end into the store, and last its manifest says "complete". So the store does not depend on the
number of workers, or on how often it was begun.

There is no lock, since a bucket has none: what is written under a name is the same whoever writes it. Two that do the same at the
same time waste the time of one.
"""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import tensorstore as ts

from hybrid_jax.data import DataError, documents, parts
from hybrid_jax.data.folders import folder_url, open_folder, reason, remove_folder
from hybrid_jax.data.parts import COUNTS, SPLITS
from hybrid_jax.data.store import SHARD, VERSION, create_array, lacks, open_array, read_manifest, token_dtype
from hybrid_jax.data.tokenizers import Tokenizer, load_tokenizer

BATCH_BYTES = 1 << 20  # of text handed to the tokenizer at once
WRITES = 2  # blocks of the store on their way to it
Progress = Callable[[str, int, int], None]  # what is going on, how much of it is done, of how much


@dataclass(frozen=True)
class Recipe:
    """What every worker needs to know, and what a store is the result of, beside the files."""

    tokenizer: str
    document_end: str | None
    text_field: str
    validation_fraction: float


def build_store(
    inputs: list[str],
    output,
    *,
    tokenizer: str = "bytes",
    document_end: str | None = None,
    text_field: str = "text",
    validation_fraction: float = 0.005,
    shard: tuple[int, int] = (0, 1),
    workers: int = 1,
    unit_bytes: int = documents.UNIT_BYTES,
    progress: Progress = lambda phase, done, total: None,
) -> dict:
    """Build, or finish building, the token store ``output`` (a folder, local or in a bucket) from ``inputs``; return its manifest.

    ``inputs`` are files, globs and folders (`documents.find_files`), ``tokenizer`` and ``document_end`` as for
    `load_tokenizer`. A document is held out by a hash of its text, so that the same text is always in the same split;
    documents without any text are left out. A finished store of the same input is returned as it is. On the way the folder
    takes twice the room of the store.

    ``shard`` (i, n) makes the i-th, from 0, of n shares of the parts. While parts of other shards are not there, what is returned is
    {"complete": False, "parts": how many there are, "missing": files that missing parts are of}; the shard that finds all there finishes
    the store.

    Raises `DataError` at bad input (naming file and line), a full disk, an ``output`` that holds something else.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(f"--validation_fraction={validation_fraction}: give a share of the documents, from 0 up to 1")
    if "://" not in str(output) and os.path.exists(output) and not os.path.isdir(output):
        raise DataError(f"--output={output} is a file: give a folder")
    recipe = Recipe(tokenizer, document_end, text_field, validation_fraction)
    loaded = load_tokenizer(tokenizer, document_end)
    files = documents.find_files(inputs)
    units = {parts.name_of(unit): unit for unit in documents.plan_units(files, unit_bytes)}
    made_from = {
        "tokenizer": loaded.fingerprint,
        "text_field": text_field,
        "validation_fraction": validation_fraction,
        "input": hashlib.sha256("".join(units).encode()).hexdigest(),
    }
    folder = open_folder(output)
    with _errors_in_one_line(output):
        manifest, _ = _claim(folder, output, made_from)
        if not manifest["complete"]:
            _make_parts(_share(units, *shard), output, recipe, workers, progress)
            missing = units.keys() - parts.finished(folder)
            manifest, claimed = _claim(folder, output, made_from)  # others may have finished the store in the meantime
            if missing and not manifest["complete"]:
                return {"complete": False, "parts": len(units), "missing": [units[name].files[0].path for name in units if name in missing]}
        if not manifest["complete"]:
            try:
                manifest = _merge(folder, output, list(units), inputs, loaded, claimed, progress) | {"made_from": made_from}
                if not _write_manifest(folder, manifest, claimed):
                    raise Overtaken(output)
            except (parts.Gone, Overtaken):
                manifest = read_manifest(output)
                if manifest["made_from"] != made_from:
                    raise Overtaken(output) from None
                if not manifest["complete"]:
                    raise
        remove_folder(output, "parts")
        return manifest


def _share(units: dict[str, documents.Unit], i: int, n: int) -> dict[str, documents.Unit]:
    """The share of ``units`` that shard ``i`` of ``n`` makes, the largest first.

    Dealt out in the order of their sizes, so that no two shares differ by more than the largest unit; and those of one file, which
    are of one size, fall to different shards, so that a file with long documents is nobody's alone.
    """
    return dict(sorted(units.items(), key=lambda item: -item[1].size)[i::n])


# The manifest: who builds what here


def _claim(folder: ts.KvStore, output, made_from: dict) -> tuple[dict, bytes]:
    """The manifest of ``output``, finished or one that says what is being built here, and its generation.

    Raises `DataError` where ``output`` is of something else.
    """
    generation = folder.read("manifest.json").result().stamp.generation  # before what is decided on
    manifest = read_manifest(output)
    if manifest is None:
        others = [key for key in folder.list().result() if not key.startswith(b"parts/")]
        if others and read_manifest(output) is None:  # read again: another shard may have begun just now
            raise DataError(f"--output={output} holds something that is not a token store: give an empty or new folder")
    else:
        # Unfinished, the input may have been mended; the parts say for themselves which of it they hold.
        finished = manifest["complete"]
        different = [key for key in made_from if made_from[key] != manifest["made_from"][key] and (finished or key != "input")]
        if different:
            state = "a finished" if finished else "an unfinished"
            what = f"{state} token store of another {' and '.join(different)}"
            raise DataError(f"--output={output} holds {what}: give another folder, or delete it")
        if manifest["made_from"] == made_from:
            return manifest, generation
    manifest = {"token_store_version": VERSION, "complete": False, "made_from": made_from}
    written = _write_manifest(folder, manifest, generation)
    return (manifest, written) if written else _claim(folder, output, made_from)


def _write_manifest(folder: ts.KvStore, manifest: dict, generation: bytes) -> bytes:
    """The new generation; empty, and nothing is written, where it is not ``generation`` any more."""
    return folder.write("manifest.json", json.dumps(manifest, indent=1), if_equal=generation).result().generation


class Overtaken(DataError):
    """Another process has claimed or finished the store that this one is at."""

    def __init__(self, output):
        super().__init__(f"another process builds {output} from other input: give each its own folder, delete this one, and run again")


@contextlib.contextmanager
def _errors_in_one_line(output):
    """What a disk that is full, a folder without the right to it and a bucket that cannot be reached have to say."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore raises ValueError
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise DataError(f"no space left on the disk of {output}: free some and run the same command again, nothing is lost") from None
        if isinstance(error, DataError):
            raise
        if "://" not in str(output):
            if not (code := re.search(r"os_error_code='(\d+)'", str(error))):
                raise
            raise DataError(f"cannot write to {output} ({os.strerror(int(code[1]))}): give another --output, or the right to it") from None
        remedy = "check the address and your right to write it, and run the same command again"
        raise DataError(f"{output}: {reason(error)}: {remedy}") from None


# Parts


def _make_parts(units: dict[str, documents.Unit], output, recipe: Recipe, workers: int, progress: Progress) -> None:
    there = parts.finished(open_folder(output))
    missing = [unit for name, unit in units.items() if name not in there]
    total = sum(unit.size for unit in units.values())
    done = total - sum(unit.size for unit in missing)
    progress("tokenizing", done, total)
    if not missing:
        return
    # Spawned: a forked worker would inherit the threads of TensorStore and of the tokenizer half-alive.
    spawned = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(missing)), spawned, _start_worker, (output, recipe, workers > 1))
    try:
        futures = {pool.submit(_make_part, unit): unit for unit in missing}
        for future in as_completed(futures):
            future.result()
            done += futures[future].size
            progress("tokenizing", done, total)
    except BrokenProcessPool:
        raise DataError("a worker was killed (out of memory?): run the same command again with fewer --workers, nothing is lost") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(output, recipe: Recipe, several: bool) -> None:
    global _folder, _recipe, _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at Ctrl-C go at once and without a word
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if several:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _folder, _recipe, _tokenizer = open_folder(output), recipe, load_tokenizer(recipe.tokenizer, recipe.document_end)


def _end_with_parent() -> None:
    """A worker whose parent was killed outright would wait for work for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make_part(unit: documents.Unit) -> None:
    make_part(unit, _folder, _recipe, _tokenizer)


def make_part(unit: documents.Unit, folder: ts.KvStore, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Write the tokens of ``unit`` into the store's ``folder``, as a part that is there when it is whole."""
    dtype = token_dtype(tokenizer.vocabulary)
    part = parts.Writer(folder, unit)
    for texts, contents in _text_batches(unit, recipe.text_field):
        for content, ids in zip(contents, tokenizer.encode_batch(texts), strict=True):
            split = "validation" if _hash_fraction(content) < recipe.validation_fraction else "train"
            part.add(split, np.array([*ids, tokenizer.document_end], dtype), len(content))
    part.close()


def _text_batches(unit: documents.Unit, text_field: str) -> Iterator[tuple[list[str], list[bytes]]]:
    """Documents and their UTF-8 bytes, together enough to keep a tokenizer busy."""
    texts, contents, held = [], [], 0
    for text, where in documents.read_documents(unit, text_field):
        try:
            content = text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise DataError(f"{where()}: text that has no UTF-8 form ({error.reason}): mend or remove it") from None
        if not content:
            continue
        texts.append(text)
        contents.append(content)
        held += len(content)
        if held >= BATCH_BYTES:
            yield texts, contents
            texts, contents, held = [], [], 0
    if texts:
        yield texts, contents


def _hash_fraction(content: bytes) -> float:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) / 2**64


# The store


def _merge(
    folder: ts.KvStore, output, names: list[str], inputs: list[str], tokenizer: Tokenizer, claimed: bytes, progress: Progress
) -> dict:
    """Lay the parts ``names`` end to end, and return the manifest of the store.

    Raises `Overtaken` where the manifest is not ``claimed`` any more, before more is written over what may be another's.
    """
    records = parts.read_records(folder, names)
    parts.check_records(records, documents.find_files(inputs))
    splits = {split: {name: sum(record["splits"][split][name] for record in records) for name in COUNTS} for split in SPLITS}
    if not sum(split["documents"] for split in splits.values()):
        raise DataError("the input holds no text: give files with at least one document that is not empty")
    if not splits["train"]["documents"]:
        raise DataError(f"the text has {lacks(splits)}")
    splits = {split: numbers for split, numbers in splits.items() if numbers["documents"]}
    dtype = token_dtype(tokenizer.vocabulary)
    done, total = 0, sum(numbers["tokens"] for numbers in splits.values())

    def check_claim():
        if folder.read("manifest.json").result().stamp.generation != claimed:
            raise Overtaken(output)

    def counted(blocks, digest):
        nonlocal done
        for block in blocks:
            digest.update(block)
            done += len(block)
            yield block
            progress("writing the store", done, total)

    tokenizer.save(output)
    for split, numbers in splits.items():
        digest = hashlib.sha256()
        tokens = _in_shards(parts.read_array(folder, names, records, f"{split}.tokens", dtype), dtype)
        _write_array(f"{folder_url(output)}{split}/tokens/", numbers["tokens"], dtype, counted(tokens, digest), check_claim)
        lengths = parts.read_array(folder, names, records, f"{split}.lengths", np.dtype(np.int64))
        ends = _ends(_in_shards(lengths, np.dtype(np.int64)), numbers["tokens"])
        _write_array(f"{folder_url(output)}{split}/documents/", numbers["documents"], np.dtype(np.int64), ends, check_claim)
        numbers["sha256"] = digest.hexdigest()
    return {
        "token_store_version": VERSION,
        "complete": True,
        "tokenizer": {name: getattr(tokenizer, name) for name in ("name", "vocabulary", "document_end", "fingerprint")},
        "dtype": dtype.name,
        "splits": splits,
    }


def _in_shards(arrays: Iterable[np.ndarray], dtype: np.dtype) -> Iterator[np.ndarray]:
    """``arrays`` laid end to end, in blocks of `SHARD` items and a last one of what is left."""
    block, held = np.empty(SHARD, dtype), 0
    for array in arrays:
        while len(array):
            fits = min(len(array), SHARD - held)
            block[held : held + fits] = array[:fits]
            array, held = array[fits:], held + fits
            if held == SHARD:
                yield block
                block, held = np.empty(SHARD, dtype), 0
    if held:
        yield block[:held]


def _ends(lengths: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """Where documents of ``lengths`` end. Raises `DataError` unless the last one ends at ``total``."""
    end = 0
    for block in lengths:
        ends = end + np.cumsum(block)
        end = int(ends[-1])
        yield ends
    if end != total:
        raise DataError(f"the documents of the parts have {end:,} tokens, and their records say {total:,}: {parts.AGAIN}")


def _write_array(url: str, size: int, dtype: np.dtype, blocks: Iterable[np.ndarray], check_claim: Callable[[], None]) -> None:
    """Write ``blocks`` in a row. ``check_claim`` is called before anything that is there is written over, to raise if it may not be."""
    check_claim()
    array, start, writes = create_array(url, size, dtype), 0, deque()
    for block in blocks:
        if start + len(block) > size:
            break
        check_claim()
        writes.append(array[start : start + len(block)].write(block))
        start += len(block)
        if len(writes) == WRITES:
            writes.popleft().result()
    for write in writes:
        write.result()
    if start != size:
        raise DataError(f"the parts hold other than the {size:,} items that their records say of {url}: {parts.AGAIN}")
    open_array(url, size, dtype)  # all of it is there
