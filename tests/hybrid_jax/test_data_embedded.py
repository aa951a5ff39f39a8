"""The embedded default: the standard library's source and its split."""

import os
import subprocess
import sys

import numpy as np
import pytest

from hybrid_jax.data import DataError, embedded
from hybrid_jax.data.sources import make_sources
from hybrid_jax.data.tokenizers import ByteTokenizer
from tests.hybrid_jax.data_samples import documents_of, write_texts


def test_standard_library():
    train, held_out = make_sources("stdlib")
    assert len(train) > 3_000_000 and 0.01 < len(held_out) / len(train) < 0.12
    documents = documents_of(train), documents_of(held_out)
    with open(os.__file__, encoding="utf-8") as module:
        assert module.read() in documents[0] + documents[1]
    assert not set(documents[0]) - {""} & set(documents[1])
    for source, found in zip((train, held_out), documents, strict=True):
        assert source.bytes == len(source) - len(found)
        source.check_vocabulary(257)
    again = make_sources("stdlib")
    assert [source.fingerprint for source in again] == [train.fingerprint, held_out.fingerprint]
    assert train.fingerprint != held_out.fingerprint


def test_split_by_file(tmp_path):
    """Order and split follow from the paths alone; tests and packages stay out."""
    for i in range(200):
        file = tmp_path / f"folder{i % 7}" / f"{i}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"file {i}")
    for name in "test", "site-packages", "config-3", "__pycache__":
        write_texts(tmp_path / name, ["left out"])
        (tmp_path / name / "a.py").write_text("left out")
    (tmp_path / "_sysconfigdata_x.py").write_text("left out")
    train, held_out = (documents_of(source) for source in embedded.standard_library(tmp_path))
    paths = sorted(f"folder{i % 7}/{i}.py" for i in range(200))
    in_order = ["file " + path.split("/")[1].removesuffix(".py") for path in paths]
    assert train == [text for text in in_order if text not in held_out] and held_out == [text for text in in_order if text in held_out]
    assert 1 <= len(held_out) <= 25


def test_no_source_text(tmp_path):
    with pytest.raises(DataError, match="holds no Python source text to train on: give a token store"):
        embedded.standard_library(tmp_path)


def test_workers_start_without_jax():
    """What a tokenizing process imports."""
    code = "import sys, hybrid_jax.data.build, hybrid_jax.data.sources; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_tokens_of_another_tokenizer(tmp_path):
    for i in range(60):
        (tmp_path / f"module_{i}.py").write_bytes(f"välue_{i} = {i}\r\n".encode())  # whatever the locale, and as the file has it
    plain, _ = embedded.standard_library(tmp_path)
    upper = ByteTokenizer()
    upper.encode_batch = lambda texts: [list(text.encode().upper()) for text in texts]
    source, held_out = embedded.standard_library(tmp_path, upper)
    assert (source.bytes, len(source)) == (plain.bytes, len(plain)) and len(held_out) > 0
    np.testing.assert_array_equal(source.documents, plain.documents)
    first = slice(0, source.documents[0] - 1)
    assert bytes(source.tokens[first].tolist()) == bytes(plain.tokens[first].tolist()).upper()
    assert source.tokens[source.documents[0] - 1] == upper.document_end
