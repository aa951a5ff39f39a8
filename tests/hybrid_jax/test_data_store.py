"""Token stores: what was built is what is read, from a folder or a bucket, and what is no whole store is refused."""

import json
import shutil

import numpy as np
import pytest
import tensorstore as ts

from hybrid_jax.data import DataError, store
from hybrid_jax.data.build import build_store
from hybrid_jax.data.sources import make_sources
from hybrid_jax.data.store import TokenStore
from tests.hybrid_jax.data_samples import bpe_tokenizer, documents_of, texts, write_jsonl, write_texts

DOCUMENTS = texts(300, longest=2000)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A store of 300 documents, over several chunks, and its manifest."""
    folder = tmp_path_factory.mktemp("a store 100%")  # a path that a URL has to escape
    write_jsonl(folder / "in" / "a.jsonl", DOCUMENTS)
    manifest = build_store([str(folder / "in")], folder / "store", validation_fraction=0.2)
    return folder / "store", manifest


def test_round_trip(built):
    folder, manifest = built
    train, held_out = make_sources(str(folder))
    found = documents_of(train), documents_of(held_out)
    assert sorted(found[0] + found[1]) == sorted(DOCUMENTS) and 30 < len(found[1]) < 90
    for documents in found:
        assert documents == [text for text in DOCUMENTS if text in set(documents)]  # in the order of the input
    for split, source in ("train", train), ("validation", held_out):
        documents = documents_of(source)
        assert source.bytes == sum(len(text.encode()) for text in documents) == manifest["splits"][split]["bytes"]
        assert len(source.documents) == len(documents) == manifest["splits"][split]["documents"]
        assert len(source) == source.bytes + len(documents) == manifest["splits"][split]["tokens"]
    assert train.fingerprint != held_out.fingerprint and train.documents.dtype == np.int64


def test_reads_across_chunks(built):
    source = TokenStore.open(built[0], "train")
    everything = source.read(0, len(source))
    assert len(everything) > 3 * store.CHUNK and everything.dtype == np.uint16
    rng = np.random.default_rng(0)
    ranges = [tuple(map(int, np.sort(rng.integers(0, len(source) + 1, 2)))) for _ in range(20)]
    for (start, stop), tokens in zip(ranges, source.read_ranges(ranges), strict=True):
        np.testing.assert_array_equal(tokens, everything[start:stop])


def test_the_largest_vocabulary_of_two_bytes():
    """Ids are below it: 65,535 is the last that fits, and one more would be stored as 0."""
    assert [store.token_dtype(n) for n in (257, 65_536, 65_537)] == [np.uint16, np.uint16, np.uint32]


def test_several_shards(tmp_path, monkeypatch):
    """Of tokens and of documents, one of them all zeros, which zarr would leave out."""
    monkeypatch.setattr(store, "CHUNK", 32)
    monkeypatch.setattr(store, "SHARD", 128)
    monkeypatch.setattr("hybrid_jax.data.build.SHARD", 128)
    documents = [*texts(300, longest=20), "\0" * 400, *texts(100, seed=1, longest=20)]
    write_texts(tmp_path / "in", documents)
    build_store([str(tmp_path / "in")], tmp_path / "store", unit_bytes=1000, validation_fraction=0)
    source = TokenStore.open(tmp_path / "store", "train")
    assert documents_of(source) == documents
    shards = {array: len(list((tmp_path / "store" / "train" / array / "c").iterdir())) for array in ("tokens", "documents")}
    assert shards == {"tokens": -(-len(source) // 128), "documents": 4}
    (tmp_path / "store" / "train" / "documents" / "c" / "1").unlink()
    with pytest.raises(DataError, match="documents/ has 3 of its 4 shards: copy the store again"):
        TokenStore.open(tmp_path / "store", "train")


def test_wide_vocabulary(tmp_path):
    """Ids beyond 16 bits."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 70_000, "</s>": 65_536}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}))
    write_texts(tmp_path / "in", ["a b a", "b b"])
    build_store([str(tmp_path / "in")], tmp_path / "store", tokenizer=str(tmp_path), validation_fraction=0)
    source = TokenStore.open(tmp_path / "store", "train")
    assert source.read(0, len(source)).tolist() == [0, 70_000, 0, 65_536, 70_000, 70_000, 65_536]
    assert source.read(0, 1).dtype == np.uint32 and source.bytes == 8


def test_hugging_face_tokenizer_travels_with_the_store(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(bpe_tokenizer(["</s>"]))
    write_texts(tmp_path / "in", DOCUMENTS[:50])
    build_store([str(tmp_path / "in")], tmp_path / "store", tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0)
    (tmp_path / "tokenizer.json").unlink()
    source = TokenStore.open(tmp_path / "store", "train")
    assert documents_of(source) == DOCUMENTS[:50]
    assert len(source) < 0.9 * source.bytes


def test_from_a_bucket(built):
    """Any key-value store that TensorStore knows; here the one in memory."""
    bucket = ts.KvStore.open("memory://bucket/store/", context=store.CONTEXT).result()
    for file in built[0].rglob("*"):
        if file.is_file():
            bucket.write(str(file.relative_to(built[0])), file.read_bytes()).result()
    for split in "train", "validation":
        local, remote = TokenStore.open(built[0], split), TokenStore.open("memory://bucket/store", split)
        np.testing.assert_array_equal(remote.read(0, len(remote)), local.read(0, len(local)))
        np.testing.assert_array_equal(remote.documents, local.documents)
        assert remote.fingerprint == local.fingerprint and remote.tokenizer.name == "bytes"


def test_vocabulary_too_large_for_the_model(built):
    source = TokenStore.open(built[0], "train")
    source.check_vocabulary(257)
    with pytest.raises(DataError, match="vocabulary of 257, the model has 256: set the model's vocabulary to at least 257"):
        source.check_vocabulary(256)


def refuses(match, location, split="train"):
    with pytest.raises(DataError, match=match) as error:
        TokenStore.open(location, split)
    assert "\n" not in str(error.value)


def test_no_store(tmp_path):
    refuses("no token store at .*none: the folder does not exist; build one with python -m experiments.tokenize", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refuses("the token store .*empty is empty; build one", tmp_path / "empty")
    write_texts(tmp_path / "other", ["a"])
    refuses("other is not a token store: it has no manifest.json; build one", tmp_path / "other")
    refuses(f"--input={tmp_path}/other --output={tmp_path}/other_store$", tmp_path / "other")
    build = f"build one with .* --input={tmp_path}/other/00000.txt --output={tmp_path}/other/00000_store, and give that folder"
    refuses(f"00000.txt is a file, not a token store: {build}", tmp_path / "other" / "00000.txt")
    refuses("the token store memory://none is empty", "memory://none")
    ts.KvStore.open("memory://other/", context=store.CONTEXT).result().write("a", b"b").result()
    refuses("memory://other is not a token store: it has no manifest.json; copy a finished store there", "memory://other")
    refuses("cannot read nokind://a: .*: check the address", "nokind://a")


def test_damaged(built, tmp_path):
    def damaged(name, change, match):
        copy = tmp_path / name
        shutil.copytree(built[0], copy)
        change(copy)
        refuses(match, copy)

    def manifest(**changes):
        def change(copy):
            file = copy / "manifest.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return change

    damaged("half", manifest(complete=False), "half is half-written: run the same experiments.tokenize command again to finish it")
    damaged("split", manifest(splits={"validation": {}}), "has no train documents: build it again .* smaller --validation_fraction")
    damaged("version", manifest(token_store_version=99), "of version 99, this code reads version 1: build it again")
    damaged("cut", lambda copy: (copy / "manifest.json").write_text("{"), "manifest.json is not a token store's")
    damaged("type", manifest(dtype="uint32"), r"tokens/ is uint16\[\d+\], its manifest says uint32\[\d+\]: copy the store again")
    damaged("array", lambda copy: shutil.rmtree(copy / "train" / "tokens"), "should hold an array of the token store and does not: copy")
    damaged("shard", lambda copy: (copy / "train" / "tokens" / "c" / "0").unlink(), "has 0 of its 1 shard: copy the store again")
    damaged("tokenizer", lambda copy: (copy / "tokenizer.json").write_bytes(bpe_tokenizer(["</s>"])), "is not the one that built the store")
