"""The token store: tokens and document boundaries as sharded zarr arrays, read with TensorStore from a disk or a bucket.

STORE/manifest.json            what is in it, from which tokenizer; "complete" once everything is
STORE/tokenizer.json           (or .model, and tokenizer_config.json) the tokenizer itself
STORE/SPLIT/tokens/            [tokens] uint16 or uint32: documents end to end, each closed by the tokenizer's document_end
STORE/SPLIT/documents/         [documents] int64: where each document ends
with SPLIT "train" or "validation"
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorstore as ts

from hybrid_jax.amounts import count
from hybrid_jax.data import DataError
from hybrid_jax.data.folders import CONTEXT, folder_url, open_folder, reason
from hybrid_jax.data.token_source import TokenSource
from hybrid_jax.data.tokenizers import FILES, Tokenizer, tokenizer_from_files

VERSION = 1
SHARD = 1 << 26  # items a file: what is written, listed and copied
CHUNK = 1 << 15  # items a chunk: what a read fetches at the least


def token_dtype(vocabulary: int) -> np.dtype:
    """The smallest unsigned type of ids below ``vocabulary`` that stores use."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def create_array(url: str, size: int, dtype: np.dtype) -> ts.TensorStore:
    """The sharded array [size] at ``url``, in the place of any other that is there. Write it in whole blocks of `SHARD`."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    shard = {"chunk_shape": [CHUNK], "codecs": [little_endian], "index_codecs": [little_endian, {"name": "crc32c"}]}
    metadata = {
        "shape": [size],
        "data_type": np.dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }
    spec = {"driver": "zarr3", "kvstore": url, "metadata": metadata, "store_data_equal_to_fill_value": True}
    try:
        # One that was begun is gone on with: nothing that another process has just written there is taken away.
        return ts.open(spec, create=True, open=True, context=CONTEXT).result()
    except ValueError:
        return ts.open(spec, create=True, delete_existing=True, context=CONTEXT).result()


def open_array(url: str, size: int, dtype: np.dtype) -> ts.TensorStore:
    """The array at ``url``. Raises `DataError` unless it is [size] of ``dtype`` and all its shards are there.

    A shard that is missing would read as zeros, so that a copy cut short would train without a word.
    """
    remedy = "copy the store again from where it is whole, or build it again in an empty folder"
    try:
        array = ts.open({"driver": "zarr3", "kvstore": url}, read=True, context=CONTEXT).result()
    except ValueError as error:
        raise DataError(f"{url} should hold an array of the token store and does not: {remedy} ({reason(error)})") from None
    if array.shape != (size,) or array.dtype.numpy_dtype != dtype:
        raise DataError(f"{url} is {array.dtype.name}{list(array.shape)}, its manifest says {np.dtype(dtype).name}[{size}]: {remedy}")
    shards = [key for key in array.kvstore.list().result() if key.startswith(b"c/")]
    if len(shards) != -(-size // SHARD):
        raise DataError(f"{url} has {len(shards)} of its {count(-(-size // SHARD), 'shard')}: {remedy}")
    return array


def read_manifest(location) -> dict | None:
    """The manifest of the store at ``location``, finished or not; None where there is none.

    Raises `DataError` where it cannot be read, or is no manifest of a version this code knows.
    """
    try:
        found = open_folder(location).read("manifest.json").result()
    except ValueError as error:
        raise DataError(f"cannot read {location}: {reason(error)}: check the address and your right to read it") from None
    if found.state == "missing":
        return None
    try:
        manifest = json.loads(found.value)
        version = manifest["token_store_version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{location}/manifest.json is not a token store's: give the folder experiments.tokenize wrote") from None
    if version != VERSION:
        raise DataError(f"{location} is a token store of version {version}, this code reads version {VERSION}: build it again")
    return manifest


class TokenStore(TokenSource):
    """One split of a finished token store; see `TokenSource`."""

    def __init__(self, url: str, split: str, manifest: dict, tokenizer: Tokenizer):
        counts = manifest["splits"][split]
        self.name = f"{url} ({split})"
        self.bytes, self.fingerprint = counts["bytes"], counts["sha256"]
        self.tokenizer = tokenizer
        self._tokens = open_array(f"{url}{split}/tokens/", counts["tokens"], np.dtype(manifest["dtype"]))
        self._documents = open_array(f"{url}{split}/documents/", counts["documents"], np.dtype(np.int64))

    @classmethod
    def open(cls, location, split: str) -> "TokenStore":
        """The ``split`` ("train" or "validation") of the store at ``location``, a folder or a bucket URL.

        Raises `DataError` where the store is missing, empty, half-written, damaged or something else, or has no such split.
        """
        manifest = read_manifest(location)
        if manifest is None:
            raise DataError(_why_no_store(location))
        if not manifest["complete"]:
            raise DataError(f"the token store {location} is half-written: run the same experiments.tokenize command again to finish it")
        if split not in manifest["splits"]:
            raise DataError(f"the token store {location} has {lacks(manifest['splits'])}")
        url = folder_url(location)
        files = open_folder(location)
        read = {name: files.read(name).result() for name in (*FILES, "tokenizer_config.json")}
        file = next((name for name in FILES if read[name].state == "value"), FILES[0])
        config = read["tokenizer_config.json"]
        config = config.value if config.state == "value" else None
        tokenizer = tokenizer_from_files(read[file].value, config, name=f"{location}/{file}")
        if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
            raise DataError(f"the tokenizer in {location} is not the one that built the store: copy the store again from where it is whole")
        return cls(url, split, manifest, tokenizer)

    def __len__(self) -> int:
        return self._tokens.shape[0]

    @cached_property
    def documents(self) -> np.ndarray:
        return self._documents.read().result()

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        reads = [self._tokens[start:stop].read() for start, stop in ranges]  # all under way before the first is waited for
        return [read.result() for read in reads]


def lacks(splits: dict[str, dict]) -> str | None:
    """What keeps a store of these ``splits`` from being trained on, and what to do; None where both have documents."""
    empty = [split for split in ("train", "validation") if not splits.get(split, {}).get("documents")]
    if not empty:
        return None
    if sum(numbers.get("documents", 0) for numbers in splits.values()) == 1:
        return (
            "a single document, and needs one to train on and one held out at least: make several of it, one a .txt file or a line of "
            ".jsonl, and build the store again in another folder"
        )
    change = "larger" if empty[0] == "validation" else "smaller"
    return f"no {empty[0]} documents: build it again in another folder with more documents or a {change} --validation_fraction"


def _why_no_store(location) -> str:
    tokenize = "build one with python -m experiments.tokenize"
    build = f"{tokenize} --input=TEXT --output={location}"
    if "://" not in str(location):
        path = Path(location)
        if not path.exists():
            return f"no token store at {location}: the folder does not exist; {build}"
        if not path.is_dir():
            store = path.with_name(f"{path.name.split('.')[0]}_store")
            return f"{location} is a file, not a token store: {tokenize} --input={location} --output={store}, and give that folder"
        if any(path.iterdir()):
            store = path.with_name(f"{path.name}_store")
            return f"{location} is not a token store: it has no manifest.json; {tokenize} --input={location} --output={store}"
    elif open_folder(location).list().result():
        return f"{location} is not a token store: it has no manifest.json; copy a finished store there"
    return f"the token store {location} is empty; {build}"
