"""Building a store: the same whatever the format and the number of workers; what is refused; what a full disk leaves.

That a kill at any moment loses and doubles nothing is shown in tests/experiments/test_tokenize.py, on the command.
"""

import errno
import json

import pytest

from hybrid_jax.data import DataError, build
from hybrid_jax.data.build import build_store
from hybrid_jax.data.sources import make_sources
from tests.hybrid_jax.data_samples import bpe_tokenizer, documents_of, texts, write_jsonl, write_parquet, write_texts

DOCUMENTS = texts(120)


def content(folder) -> dict[str, bytes]:
    """Every file of a store, byte for byte."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_all_formats_and_any_number_of_workers_give_one_store(tmp_path):
    write_texts(tmp_path / "txt", DOCUMENTS)
    write_jsonl(tmp_path / "jsonl" / "a.jsonl", DOCUMENTS)
    write_jsonl(tmp_path / "gz" / "a.jsonl.gz", DOCUMENTS[:60])
    write_jsonl(tmp_path / "gz" / "b.jsonl.zst", DOCUMENTS[60:])
    write_parquet(tmp_path / "parquet" / "a.parquet", DOCUMENTS, rows_a_group=9)
    stores = {}
    for name, workers, unit_bytes in ("txt", 2, 2000), ("jsonl", 1, 3000), ("gz", 2, 1 << 20), ("parquet", 1, 5000):
        output = tmp_path / f"{name} store"
        build_store([str(tmp_path / name)], output, validation_fraction=0.2, workers=workers, unit_bytes=unit_bytes)
        stores[name] = content(output)
        del stores[name]["manifest.json"]  # says what it was made from
    assert stores["txt"] == stores["jsonl"] == stores["gz"] == stores["parquet"]
    assert set(stores["txt"]) == {"tokenizer.json", *(
        f"{split}/{array}/{file}" for split in ("train", "validation") for array in ("tokens", "documents") for file in ("zarr.json", "c/0")
    )}  # fmt: skip
    build_store([str(tmp_path / "txt")], tmp_path / "again", validation_fraction=0.2, workers=1, unit_bytes=2000)
    assert content(tmp_path / "again") == content(tmp_path / "txt store")  # the manifest too


def test_split_follows_the_text(tmp_path):
    """The same texts are held out whatever else is there and wherever they are, so no text is in both splits."""
    write_texts(tmp_path / "all", DOCUMENTS + DOCUMENTS[::-1])
    write_texts(tmp_path / "half", DOCUMENTS[::2])
    held_out = {}
    for name in "all", "half":
        build_store([str(tmp_path / name)], tmp_path / f"{name} store", validation_fraction=0.3)
        train, validation = (documents_of(source) for source in make_sources(str(tmp_path / f"{name} store")))
        held_out[name] = set(validation)
        assert not held_out[name] & set(train)
    assert len(held_out["half"]) > 5
    assert held_out["half"] == held_out["all"] & set(DOCUMENTS[::2])


def test_documents_without_text_are_left_out(tmp_path):
    write_texts(tmp_path / "in", ["", "a", "", "\n"])
    manifest = build_store([str(tmp_path / "in")], tmp_path / "store", validation_fraction=0)
    assert manifest["splits"] == {"train": {"tokens": 4, "documents": 2, "bytes": 2, "sha256": manifest["splits"]["train"]["sha256"]}}


def test_finished_is_left_alone(tmp_path):
    write_texts(tmp_path / "in", DOCUMENTS)
    first = build_store([str(tmp_path / "in")], tmp_path / "store")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    assert build_store([str(tmp_path / "in")], tmp_path / "store", unit_bytes=1 << 30) == first
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}


def refuses(match, inputs, output, **options):
    with pytest.raises(DataError, match=match) as error:
        build_store([str(inputs)], output, **options)
    assert "\n" not in str(error.value)


def test_output_of_another_build(tmp_path):
    write_texts(tmp_path / "in", DOCUMENTS)
    (tmp_path / "tokenizer.json").write_bytes(bpe_tokenizer(["</s>"]))
    output = tmp_path / "store"
    build_store([str(tmp_path / "in")], output)
    another = "store holds a finished token store of another"
    refuses(f"{another} tokenizer: give another folder, or delete it", tmp_path / "in", output, tokenizer=str(tmp_path))
    refuses(f"{another} validation_fraction", tmp_path / "in", output, validation_fraction=0.1)
    (tmp_path / "in" / "more.txt").write_text("more")
    refuses(f"{another} input", tmp_path / "in", output)
    refuses("00000.txt is a file: give a folder", tmp_path / "in", tmp_path / "in" / "00000.txt")
    refuses("in holds something that is not a token store: give an empty or new folder", tmp_path / "in", tmp_path / "in")
    refuses("validation_fraction=1.0: give a share", tmp_path / "in", tmp_path / "new", validation_fraction=1.0)
    refuses("no tokenizer at", tmp_path / "in", tmp_path / "new", tokenizer="nowhere.json")


def test_nothing_to_build_from(tmp_path):
    write_texts(tmp_path / "empty", ["", ""])
    refuses("the input holds no text: give files with at least one document", tmp_path / "empty", tmp_path / "a")
    (tmp_path / "lines.jsonl").write_text("")
    refuses("the input holds no text", tmp_path / "lines.jsonl", tmp_path / "b")
    write_texts(tmp_path / "one", ["a"])
    refuses("the text has a single document, and needs one to train on", tmp_path / "one", tmp_path / "c", validation_fraction=0.9999)
    write_texts(tmp_path / "two", ["a", "b"])
    smaller = "the text has no train documents: .* with more documents or a smaller --validation_fraction"
    refuses(smaller, tmp_path / "two", tmp_path / "d", validation_fraction=0.9999)


def test_mended_input_goes_on(tmp_path):
    """A bad line stops the build; once it is mended, the parts of the other files are not made again."""
    for i in range(4):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", DOCUMENTS[30 * i : 30 * i + 30])
    bad, output = tmp_path / "in" / "3.jsonl", tmp_path / "store"
    whole = bad.read_bytes()
    bad.write_bytes(whole + b'{"text": "\\ud800"}\n')
    refuses(r"3.jsonl, line 31: text that has no UTF-8 form \(surrogates not allowed\): mend or remove it", tmp_path / "in", output)
    with pytest.raises(DataError, match="half-written: run the same"):
        make_sources(str(output))
    refuses("an unfinished token store of another text_field", tmp_path / "in", output, text_field="body")
    bad.write_bytes(whole)
    made = []
    build_store([str(tmp_path / "in")], output, progress=lambda *now: made.append(now))
    total = sum(file.stat().st_size for file in (tmp_path / "in").iterdir())
    assert made[:2] == [("tokenizing", total - len(whole), total), ("tokenizing", total, total)]
    assert sorted(text for source in make_sources(str(output)) for text in documents_of(source)) == sorted(DOCUMENTS)


def test_two_builds_at_once(tmp_path):
    """The second, begun and finished in the midst of the first, writes what the first would."""
    write_texts(tmp_path / "in", DOCUMENTS)
    build_store([str(tmp_path / "in")], tmp_path / "alone")
    for phase in "tokenizing", "writing the store":
        store, others = tmp_path / f"twice, {phase}", []

        def again(now, done, total, phase=phase, store=store, others=others):
            if now == phase and not others:
                others.append(None)
                others[0] = build_store([str(tmp_path / "in")], store)

        first = build_store([str(tmp_path / "in")], store, progress=again)
        assert first == others[0] and first["complete"]
        assert content(store) == content(tmp_path / "alone")


def test_two_builds_of_different_input_at_once(tmp_path):
    """The second finishes its own store; the first stops with a word, and has written nothing over it."""
    write_texts(tmp_path / "in", DOCUMENTS)
    write_texts(tmp_path / "other", DOCUMENTS[::-1])
    build_store([str(tmp_path / "other")], tmp_path / "alone")
    others = []

    def again(phase, done, total):
        if phase == "writing the store" and not others:
            others.append(build_store([str(tmp_path / "other")], tmp_path / "store"))

    with pytest.raises(DataError, match="another process builds .*store from other input: give each its own folder"):
        build_store([str(tmp_path / "in")], tmp_path / "store", progress=again)
    assert others[0]["complete"] and content(tmp_path / "store") == content(tmp_path / "alone")


def test_a_folder_that_cannot_be_written_to(tmp_path):
    write_texts(tmp_path / "in", DOCUMENTS)
    (tmp_path / "file").write_text("text")
    refuses(r"cannot write to .*file/store \(Not a directory\): give another --output", tmp_path / "in", tmp_path / "file" / "store")


def test_full_disk_in_a_worker(tmp_path, monkeypatch):
    """Tokens that cannot be written: no part appears."""
    write_texts(tmp_path / "in", DOCUMENTS)
    (unit,) = build.documents.plan_units(build.documents.find_files([str(tmp_path / "in")]))
    folder = build.open_folder(tmp_path / "store")

    class Full:
        def write(self, key, value):
            return folder.write(key, value) if "train" not in key else self

        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device [os_error_code='28']")

    recipe = build.Recipe("bytes", None, "text", 0.0)
    with pytest.raises(DataError, match="no space left on the disk of .*store: free some and run the same command again"):
        with build._errors_in_one_line(tmp_path / "store"):
            build.make_part(unit, Full(), recipe, build.load_tokenizer("bytes"))
    assert build.parts.finished(folder) == set()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: Error writing local file \"c/1\": No space left on device [os_error_code='28']"),  # TensorStore's
    ],
)
def test_full_disk_while_merging(tmp_path, monkeypatch, error):
    """One line, a store known to be half-written, and the same command finishes it."""

    class Full:
        def __getitem__(self, index):
            return self

        def write(self, block):
            raise error

    write_texts(tmp_path / "in", DOCUMENTS)
    with monkeypatch.context() as patch:
        patch.setattr(build, "create_array", lambda *_: Full())
        refuses("no space left on the disk of .*store: free some and run", tmp_path / "in", tmp_path / "store")
    assert not json.loads((tmp_path / "store" / "manifest.json").read_text())["complete"]
    build_store([str(tmp_path / "in")], tmp_path / "store")
    build_store([str(tmp_path / "in")], tmp_path / "never interrupted")
    assert content(tmp_path / "store") == content(tmp_path / "never interrupted")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError):
        with build._errors_in_one_line(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied")
