"""Reading text from a bucket and building a store in one, against a stand-in for Cloud Storage: all as on disk."""

import pytest

from hybrid_jax.data import DataError, inputs
from hybrid_jax.data.build import build_store
from hybrid_jax.data.documents import find_files, plan_units, read_documents
from hybrid_jax.data.sources import make_sources
from tests.hybrid_jax.data_samples import bpe_tokenizer, documents_of, texts, write_jsonl, write_parquet, write_texts

DOCUMENTS = texts(120)


def write(folder):
    """A file of every format in a folder of its own."""
    write_texts(folder / "txt", DOCUMENTS[:20])
    write_jsonl(folder / "jsonl" / "a.jsonl", DOCUMENTS[20:50])
    write_jsonl(folder / "jsonl" / "b.jsonl.gz", DOCUMENTS[50:60])
    write_jsonl(folder / "jsonl" / "deep" / "c.jsonl.zst", DOCUMENTS[60:70])
    write_parquet(folder / "parquet" / "a.parquet", DOCUMENTS[70:], rows_a_group=7)
    (folder / "parquet" / "README.md").write_text("not read")


@pytest.fixture
def bucket(gcs, tmp_path):
    """The URL of a bucket that holds, under in/, what ``tmp_path / "in"`` does."""
    write(tmp_path / "in")
    url = f"gs://{gcs.new_bucket()}"
    for file in (tmp_path / "in").rglob("*"):
        if file.is_file():
            gcs.put(f"{url}/{file.relative_to(tmp_path)}", file.read_bytes())
    return url


@pytest.mark.parametrize("unit_bytes", [700, 1 << 20])
def test_documents(bucket, tmp_path, unit_bytes):
    def read(names):
        return [text for unit in plan_units(find_files(names), unit_bytes) for text, _ in read_documents(unit, "text")]

    assert read([f"{bucket}/in/{name}" for name in ("txt", "jsonl", "parquet")]) == read(
        [f"{tmp_path}/in/{name}" for name in ("txt", "jsonl", "parquet")]
    )


def test_names(bucket, gcs):
    """Files, folders and globs stand for what they would on disk."""

    def names(pattern):
        return [file.path.removeprefix(f"{bucket}/in/") for file in find_files([f"{bucket}/in/{pattern}"])]

    assert names("parquet/a.parquet") == names("parquet") == names("parquet/") == names("p*/?.par[p-q]uet") == ["parquet/a.parquet"]
    assert names("jsonl/*.jsonl*") == ["jsonl/a.jsonl", "jsonl/b.jsonl.gz"]
    assert names("**/*.jsonl.*") == ["jsonl/b.jsonl.gz", "jsonl/deep/c.jsonl.zst"]
    assert len(names("")) == 24
    (file,) = find_files([f"{bucket}/in/jsonl/a.jsonl"])
    gcs.put(file.path, b"1234")
    (again,) = find_files([f"{bucket}/in/jsonl/a.jsonl"])
    assert again.size == 4 and again.modified > file.modified
    for name, match in (
        (f"{bucket}/in/none*", "names no file: give"),
        (f"{bucket}/in/parquet/*.md", "README.md is of an unknown kind"),
        ("gs://*/a", "a bucket cannot be a glob"),
        ("nokind://a/b", "cannot read nokind://a/b: "),
    ):
        with pytest.raises(DataError, match=match) as error:
            find_files([name])
        assert "\n" not in str(error.value)


def test_any_name(gcs):
    name = f"gs://{gcs.new_bucket()}/50%25 of ü/a #?.txt"
    gcs.put(name, b"text")
    (unit,) = plan_units(find_files([name.rpartition("/")[0]]))
    assert [(text, where()) for text, where in read_documents(unit, "text")] == [("text", name)]


def test_reads_are_ranges(bucket, gcs, monkeypatch):
    """A unit in the middle of a file fetches itself, not the file."""
    monkeypatch.setattr(inputs, "BUFFER", 100)
    (file,) = find_files([f"{bucket}/in/jsonl/a.jsonl"])
    units = plan_units([file], 1000)
    gcs.requests.clear()
    for _ in read_documents(units[2], "text"):
        pass
    ranges = [tuple(map(int, asked.removeprefix("bytes=").split("-"))) for _, _, _, asked in gcs.requests]
    assert min(ranges)[0] == units[2].start - 1 and units[2].stop <= max(ranges)[1] + 1 < units[2].stop + 1000 < file.size


def test_changed_while_it_is_read(bucket, gcs, monkeypatch):
    monkeypatch.setattr(inputs, "BUFFER", 100)
    (file,) = find_files([f"{bucket}/in/jsonl/a.jsonl"])
    documents = read_documents(plan_units([file])[0], "text")
    next(documents)
    gcs.put(file.path, gcs.files(f"{bucket}/in/jsonl")["a.jsonl"])
    with pytest.raises(DataError, match="a.jsonl was changed or removed while it was read: run the same command again"):
        list(documents)


def test_a_store_in_a_bucket(bucket, gcs, tmp_path):
    """From and to a bucket, with a tokenizer from there, by shards in any order: the store that is built on disk."""
    gcs.put(f"{bucket}/tokenizer.json", bpe_tokenizer(["</s>"]))
    (tmp_path / "tokenizer.json").write_bytes(bpe_tokenizer(["</s>"]))
    options = {"validation_fraction": 0.2, "unit_bytes": 4000}
    build_store([f"{tmp_path}/in"], tmp_path / "store", tokenizer=str(tmp_path / "tokenizer.json"), **options)
    results = [
        build_store([f"{bucket}/in"], f"{bucket}/store", tokenizer=f"{bucket}/{name}", shard=(i, 3), **options)
        for i, name in ((2, "tokenizer.json"), (0, ""), (2, ""), (1, "tokenizer.json"))
    ]
    assert [result["complete"] for result in results] == [False, False, False, True]
    assert results[0]["parts"] > 5 and len(results[1]["missing"]) == -(-results[0]["parts"] // 3)
    for local, remote in zip(make_sources(str(tmp_path / "store")), make_sources(f"{bucket}/store"), strict=True):
        assert documents_of(remote) == documents_of(local) and remote.fingerprint == local.fingerprint
    files = {str(file.relative_to(tmp_path / "store")): file.read_bytes() for file in (tmp_path / "store").rglob("*") if file.is_file()}
    found = gcs.files(f"{bucket}/store")
    del files["manifest.json"], found["manifest.json"]  # say where the input and the tokenizer were
    assert found == files
    assert build_store([f"{bucket}/in"], f"{bucket}/store", tokenizer=f"{bucket}/", **options) == results[-1]


def test_a_bucket_that_refuses(bucket, gcs):
    def refuses(match, *arguments, **options):
        with pytest.raises(DataError, match=match) as error:
            build_store(*arguments, **options)
        assert "\n" not in str(error.value)

    refuses("--input=gs://nobodys/in names no file", ["gs://nobodys/in"], f"{bucket}/store")
    refuses("no tokenizer at gs://bucket-.*/none.json", [f"{bucket}/in"], f"{bucket}/store", tokenizer=f"{bucket}/none.json")
    refuses("in holds something that is not a token store", [f"{bucket}/in"], f"{bucket}/in")
    refuses("gs://nobodys/store: .*check the address and your right to write", [f"{bucket}/in"], "gs://nobodys/store")
