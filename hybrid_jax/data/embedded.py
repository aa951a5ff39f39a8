"""The default that needs no download: the source text of the running Python's own standard library, as bytes or other tokens.

Documents are files in the order of their paths; about one in twenty, chosen by a hash of its path, is held out. What the
text is, and so every number measured on it, depends on the version of Python.
"""

import hashlib
import os
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np

from hybrid_jax.data import DataError
from hybrid_jax.data.store import token_dtype
from hybrid_jax.data.token_source import ArraySource
from hybrid_jax.data.tokenizers import ByteTokenizer, Tokenizer

# Tests, other people's packages, and what is tables more than text; ones that some installations leave out or patch.
LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data",
    "ensurepip", "distutils", "idlelib", "lib2to3", "tkinter", "turtledemo",
}  # fmt: skip
HELD_OUT = 0.05


def standard_library(folder=None, tokenizer: Tokenizer | None = None) -> tuple[ArraySource, ArraySource]:
    """The training and the held-out split of the `.py` files under ``folder`` (the running Python's standard library).

    tokenizer: what makes its tokens; None: they are its bytes.

    Raises `DataError` where an installation carries no source text.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    files = sorted(_python_files(folder))
    held_out = [file for file in files if _hash_fraction(file) < HELD_OUT]
    if not held_out or len(held_out) == len(files):
        raise DataError(f"{folder} holds no Python source text to train on: give a token store as the source of the data instead")
    train = [file for file in files if _hash_fraction(file) >= HELD_OUT]
    source = _source if tokenizer is None else partial(_tokenized, tokenizer)
    return source(folder, train, "the standard library (train)"), source(folder, held_out, "the standard library (held out)")


def _python_files(folder: Path):
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(parent, name).relative_to(folder).as_posix()


def _hash_fraction(path: str) -> float:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) / 2**64


def _source(folder: Path, files: list[str], name: str) -> ArraySource:
    tokenizer = ByteTokenizer()
    texts = [(folder / file).read_bytes() for file in files]
    end = np.array([tokenizer.document_end], np.uint16)
    tokens = np.concatenate([part for text in texts for part in (np.frombuffer(text, np.uint8), end)], dtype=np.uint16)
    documents = np.cumsum([len(text) + 1 for text in texts])
    return ArraySource(tokens, documents, tokenizer=tokenizer, bytes=sum(map(len, texts)), name=name)


def _tokenized(tokenizer: Tokenizer, folder: Path, files: list[str], name: str) -> ArraySource:
    texts = [(folder / file).read_bytes().decode(errors="replace") for file in files]
    rows = [np.array([*ids, tokenizer.document_end], token_dtype(tokenizer.vocabulary)) for ids in tokenizer.encode_batch(texts)]
    size = sum(len(text.encode()) for text in texts)
    return ArraySource(np.concatenate(rows), np.cumsum([len(row) for row in rows]), tokenizer=tokenizer, bytes=size, name=name)
