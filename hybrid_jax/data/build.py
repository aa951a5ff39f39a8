"""Build a token store from text, in parallel, and so that a kill at any moment loses no document and doubles none.

The input is cut into units in an order that depends on the input alone. A worker writes the tokens of its unit into a folder
of its own and renames it into place when it is whole, so a part of the store is either there or not; run again, only the parts
that are not there are made. When all are, they are laid end to end into the store, and last its manifest says "complete".
So the store does not depend on the number of workers, or on how often it was begun.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrid_jax.data import DataError, documents
from hybrid_jax.data.store import SHARD, VERSION, create_array, read_manifest, store_url, token_dtype
from hybrid_jax.data.tokenizers import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
BATCH_BYTES = 1 << 20  # of text handed to the tokenizer at once
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
    workers: int = 1,
    unit_bytes: int = documents.UNIT_BYTES,
    progress: Progress = lambda phase, done, total: None,
) -> dict:
    """Build, or finish building, the token store ``output`` (a local folder) from ``inputs`` and return its manifest.

    ``inputs`` are files, globs and folders (`documents.find_files`), ``tokenizer`` and ``document_end`` as for
    `load_tokenizer`. A document is held out by a hash of its text, so that the same text is always in the same split;
    documents without any text are left out. A finished store of the same input is returned as it is. On the way the folder
    takes twice the room of the store.

    Raises `DataError` at bad input (naming file and line), a full disk, an ``output`` that holds something else.
    """
    if "://" in str(output):
        raise DataError(f"--output={output}: stores are built in a local folder: give one, then copy it (gcloud storage cp -r)")
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(f"--validation_fraction={validation_fraction}: give a share of the documents, from 0 up to 1")
    output = Path(output).absolute()
    recipe = Recipe(tokenizer, document_end, text_field, validation_fraction)
    loaded = load_tokenizer(tokenizer, document_end)
    files = documents.find_files(inputs)
    units = documents.plan_units(files, unit_bytes)
    parts = [output / "parts" / _part_name(unit) for unit in units]
    made_from = {
        "tokenizer": loaded.fingerprint,
        "text_field": text_field,
        "validation_fraction": validation_fraction,
        "input": hashlib.sha256("".join(part.name for part in parts).encode()).hexdigest(),
    }
    with _one_line_if_full(output), _claim(output, made_from) as finished:
        if finished is None:
            _make_parts(units, parts, recipe, workers, progress)
            loaded.save(output)
            finished = _merge(output, parts, made_from, loaded, progress)
        shutil.rmtree(output / "parts", ignore_errors=True)
        return finished


def _part_name(unit: documents.Unit) -> str:
    """A name for exactly this input: parts of files that were mended after an error are made again, the others kept."""
    stats = [(file, os.stat(file)) for file in unit.files]
    identity = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats], unit.start, unit.stop
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _claim(output: Path, made_from: dict) -> Iterator[dict | None]:
    """Make ``output`` this build's own, new or continued. Gives the manifest if the store is already finished.

    The operating system drops the lock with the process, however that ends.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"--output={output} is a file: give a folder")
    if output.exists() and not (output / "manifest.json").exists() and set(os.listdir(output)) - {"parts"}:
        raise DataError(f"--output={output} holds something that is not a token store: give an empty or new folder")
    parts = output / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    with open(parts / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is building {output}: wait for it, or stop it and run this command again") from None
        manifest = read_manifest(output)
        finished = manifest is not None and manifest["complete"]
        if manifest is not None:
            # Unfinished, the input may have been mended; the parts say for themselves which of it they hold.
            different = [key for key in made_from if made_from[key] != manifest["made_from"][key] and (finished or key != "input")]
            if different:
                state = "a finished" if finished else "an unfinished"
                what = f"{state} token store of another {' and '.join(different)}"
                raise DataError(f"--output={output} holds {what}: give another folder, or delete it")
        if not finished:
            _write_manifest(output, {"token_store_version": VERSION, "complete": False, "made_from": made_from})
        yield manifest if finished else None


def _write_manifest(output: Path, manifest: dict) -> None:
    partial = output / "parts" / "manifest.json"
    with open(partial, "w") as stream:
        json.dump(manifest, stream, indent=1)
        _to_disk(stream)
    os.replace(partial, output / "manifest.json")


def _to_disk(stream) -> None:
    """So that a machine that goes down does not leave a renamed file without its content."""
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _one_line_if_full(output: Path):
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore raises ValueError
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "No space left on device" not in str(error):
            raise
        raise DataError(f"no space left on the disk of {output}: free some and run the same command again, nothing is lost") from None


# Parts


def _make_parts(units: list[documents.Unit], parts: list[Path], recipe: Recipe, workers: int, progress: Progress) -> None:
    missing = [(unit, part) for unit, part in zip(units, parts, strict=True) if not part.exists()]
    total = sum(unit.size for unit in units)
    done = total - sum(unit.size for unit, _ in missing)
    progress("tokenizing", done, total)
    if not missing:
        return
    for left_over in parts[0].parent.glob("*.partial-*"):
        shutil.rmtree(left_over)
    # Spawned: a forked worker would inherit the threads of TensorStore and of the tokenizer half-alive.
    pool = ProcessPoolExecutor(min(workers, len(missing)), multiprocessing.get_context("spawn"), _start_worker, (recipe, workers > 1))
    try:
        futures = {pool.submit(_make_part, unit, part): unit for unit, part in missing}
        for future in as_completed(futures):
            future.result()
            done += futures[future].size
            progress("tokenizing", done, total)
    except BrokenProcessPool:
        raise DataError("a worker was killed (out of memory?): run the same command again with fewer --workers, nothing is lost") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(recipe: Recipe, several: bool) -> None:
    global _recipe, _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at Ctrl-C go at once and without a word
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if several:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _recipe, _tokenizer = recipe, load_tokenizer(recipe.tokenizer, recipe.document_end)


def _end_with_parent() -> None:
    """A worker whose parent was killed outright would wait for work for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make_part(unit: documents.Unit, part: Path) -> None:
    make_part(unit, part, _recipe, _tokenizer)


def make_part(unit: documents.Unit, part: Path, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Write the tokens of ``unit`` into the folder ``part``, which appears when it is whole."""
    partial = part.with_name(f"{part.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        _write_part(unit, partial, recipe, tokenizer)
        os.rename(partial, part)
    except BaseException:
        shutil.rmtree(partial)  # room on a full disk
        raise


def _write_part(unit: documents.Unit, folder: Path, recipe: Recipe, tokenizer: Tokenizer) -> None:
    counts = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
    dtype = token_dtype(tokenizer.vocabulary)
    with contextlib.ExitStack() as stack:
        names = [f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "lengths")]
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
        for texts, contents in _text_batches(unit, recipe.text_field):
            for content, ids in zip(contents, tokenizer.encode_batch(texts), strict=True):
                split = "validation" if _hash_fraction(content) < recipe.validation_fraction else "train"
                files[f"{split}.tokens"].write(np.array([*ids, tokenizer.document_end], dtype).tobytes())
                files[f"{split}.lengths"].write(np.int64(len(ids) + 1).tobytes())
                for name, more in ("tokens", len(ids) + 1), ("documents", 1), ("bytes", len(content)):
                    counts[split][name] += more
        files["counts"] = stack.enter_context(open(folder / "counts.json", "w"))
        json.dump(counts, files["counts"])
        for stream in files.values():
            _to_disk(stream)


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


def _merge(output: Path, parts: list[Path], made_from: dict, tokenizer: Tokenizer, progress: Progress) -> dict:
    counts = [json.loads((part / "counts.json").read_text()) for part in parts]
    splits = {split: {name: sum(count[split][name] for count in counts) for name in ("tokens", "documents", "bytes")} for split in SPLITS}
    if not sum(split["documents"] for split in splits.values()):
        raise DataError("the input holds no text: give files with at least one document that is not empty")
    if not splits["train"]["documents"]:
        raise DataError("every document fell to the validation split: give a smaller --validation_fraction or more documents")
    splits = {split: numbers for split, numbers in splits.items() if numbers["documents"]}
    dtype = token_dtype(tokenizer.vocabulary)
    done, total = 0, sum(numbers["tokens"] for numbers in splits.values())
    for split, numbers in splits.items():
        digest, start = hashlib.sha256(), 0
        tokens = create_array(store_url(output / split / "tokens"), numbers["tokens"], dtype)
        for block in _blocks([part / f"{split}.tokens" for part in parts], dtype):
            tokens[start : start + len(block)].write(block).result()
            digest.update(block)
            start, done = start + len(block), done + len(block)
            progress("writing the store", done, total)
        start = end = 0
        ends = create_array(store_url(output / split / "documents"), numbers["documents"], np.int64)
        for block in _blocks([part / f"{split}.lengths" for part in parts], np.dtype(np.int64)):
            block = end + np.cumsum(block)
            ends[start : start + len(block)].write(block).result()
            start, end = start + len(block), int(block[-1])
        numbers["sha256"] = digest.hexdigest()
    manifest = {
        "token_store_version": VERSION,
        "complete": True,
        "tokenizer": {name: getattr(tokenizer, name) for name in ("name", "vocabulary", "document_end", "fingerprint")},
        "dtype": dtype.name,
        "splits": splits,
        "made_from": made_from,
    }
    _write_manifest(output, manifest)
    return manifest


def _blocks(files: list[Path], dtype: np.dtype) -> Iterator[np.ndarray]:
    """The content of ``files`` laid end to end, in blocks of `SHARD` items and a last one of what is left."""
    block, held = np.empty(SHARD, dtype), 0
    for file in files:
        with open(file, "rb") as stream:
            while True:
                read = stream.readinto(block[held:].view(np.uint8)) // dtype.itemsize
                held += read
                if held == SHARD:
                    yield block
                    block, held = np.empty(SHARD, dtype), 0
                elif not read:
                    break
    if held:
        yield block[:held]
