"""The default that needs no download: the source text of the running Python's own standard library, as bytes.

Documents are files in the order of their paths; about one in twenty, chosen by a hash of its path, is held out. What the
text is, and so every number measured on it, depends on the version of Python.
"""

import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np

from hybrid_jax.data import DataError
from hybrid_jax.data.token_source import ArraySource
from hybrid_jax.data.tokenizers import ByteTokenizer

# Tests, other people's packages, and what is tables more than text; ones that some installations leave out or patch.
LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data",
    "ensurepip", "distutils", "idlelib", "lib2to3", "tkinter", "turtledemo",
}  # fmt: skip
HELD_OUT = 0.05


def standard_library(folder=None) -> tuple[ArraySource, ArraySource]:
    """The training and the held-out split of the `.py` files under ``folder`` (the running Python's standard library).

    Raises `DataError` where an installation carries no source text.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    files = sorted(_python_files(folder))
    held_out = [file for file in files if _hash_fraction(file) < HELD_OUT]
    if not held_out or len(held_out) == len(files):
        raise DataError(f"{folder} holds no Python source text to train on: give a token store as the source of the data instead")
    train = [file for file in files if _hash_fraction(file) >= HELD_OUT]
    return _source(folder, train, "the standard library (train)"), _source(folder, held_out, "the standard library (held out)")


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
