"""The embedded default: the standard library's source, its split, and what simple models make of it."""

import lzma
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from hybrid_jax.data import DataError, embedded
from hybrid_jax.data.build import build_store
from hybrid_jax.data.compression import baselines, unigram_bits_per_byte
from hybrid_jax.data.sources import make_sources
from hybrid_jax.data.token_source import ArraySource
from hybrid_jax.data.tokenizers import ByteTokenizer
from tests.hybrid_jax.data_samples import bpe_tokenizer, documents_of, texts, write_texts


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


def source_of(documents: list[bytes]) -> ArraySource:
    tokens = np.array([token for document in documents for token in (*document, 256)], np.uint16)
    ends = np.cumsum([len(document) + 1 for document in documents])
    return ArraySource(tokens, ends, tokenizer=ByteTokenizer(), bytes=sum(map(len, documents)), name="a sample")


def test_baselines():
    train, held_out = [b"aab" * 50, b"\xff" * 10], [b"ab\xffa", b"zz"]
    found = baselines(source_of(train), source_of(held_out))
    assert found["xz -9"] == 8 * len(lzma.compress(b"ab\xffazz", preset=9)) / 6
    everything = [*b"".join(train), 256, 256]
    nats = sum(-math.log((everything.count(token) + 1) / (len(everything) + 257)) for token in [*b"ab\xffa", 256, *b"zz", 256])
    assert found["unigram"] == pytest.approx(nats / math.log(2) / 6, rel=1e-12)


def test_baselines_of_a_store_with_another_tokenizer(tmp_path):
    """xz sees the text, whatever the tokens; the unigram model is of tokens, its score by byte of text."""
    (tmp_path / "tokenizer.json").write_bytes(bpe_tokenizer(["</s>"]))
    write_texts(tmp_path / "in", texts(60))
    for name, tokenizer in ("bpe", str(tmp_path)), ("bytes", "bytes"):
        build_store([str(tmp_path / "in")], tmp_path / name, tokenizer=tokenizer, validation_fraction=0.3)
    bpe, plain = make_sources(str(tmp_path / "bpe")), make_sources(str(tmp_path / "bytes"))
    assert bpe[1].bytes == plain[1].bytes and baselines(*bpe)["xz -9"] == baselines(*plain)["xz -9"]
    assert 2 < unigram_bits_per_byte(*bpe) < 8
