"""Files to documents: every format gives the same ones however it is cut into units, and bad input is named by file and line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.data import DataError
from hybrid_jax.data.documents import find_files, plan_units, read_documents
from tests.hybrid_jax.data_samples import texts, write_jsonl, write_parquet, write_texts

DOCUMENTS = texts(200)
FORMATS = ("txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet")


def write(folder, format, documents=DOCUMENTS):
    if format == "txt":
        write_texts(folder, documents)
    elif format == "parquet":
        write_parquet(folder / "a.parquet", documents[:150], rows_a_group=7)
        write_parquet(folder / "b.parquet", documents[150:], rows_a_group=1000)
    else:
        write_jsonl(folder / f"a.{format}", documents[:150])
        write_jsonl(folder / f"b.{format}", documents[150:])
    return str(folder)


def read(inputs, unit_bytes):
    units = plan_units(find_files(inputs), unit_bytes)
    return [text for unit in units for text, _ in read_documents(unit, "text")], units


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("unit_bytes", [1, 4096, 1 << 30])
def test_every_document_once_in_order(tmp_path, format, unit_bytes):
    documents, units = read([write(tmp_path / "in", format)], unit_bytes)
    assert documents == DOCUMENTS
    assert sum(unit.size for unit in units) == pytest.approx(sum(f.stat().st_size for f in (tmp_path / "in").iterdir()), abs=len(units))
    if unit_bytes == 4096 and not format.endswith((".gz", ".zst")):
        assert len(units) > 5


@settings(deadline=None, max_examples=60)
@given(lines=st.lists(st.sampled_from(["", "a", "bb" * 20, "\u2028"]), max_size=12), unit_bytes=st.integers(1, 60), ending=st.booleans())
def test_cuts_in_jsonl_lose_no_line(tmp_path_factory, lines, unit_bytes, ending):
    """Blocks of any size: a line belongs to the block that it begins in, the last one with or without a line break."""
    file = tmp_path_factory.mktemp("in") / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines) + ("\n" if ending else ""))
    assert read([str(file)], unit_bytes)[0] == lines


def test_inputs(tmp_path):
    write(tmp_path / "one", "txt", DOCUMENTS[:3])
    write(tmp_path / "two" / "below", "jsonl", DOCUMENTS[3:])
    (tmp_path / "two" / "README.md").write_text("not read")
    inputs = [str(tmp_path / "one" / "*.txt"), str(tmp_path / "two"), str(tmp_path / "one" / "00001.txt")]  # one of them twice
    assert read(inputs, 1 << 20)[0] == DOCUMENTS
    for name, match in ("nothing*", "names no file: give"), ("two/README.md", "README.md is of an unknown kind: give"):
        with pytest.raises(DataError, match=match):
            find_files([str(tmp_path / name)])


def bad_line(tmp_path, line: bytes, format: str = "jsonl"):
    write_jsonl(tmp_path / f"a.{format}", DOCUMENTS[:100])
    if format == "jsonl":
        content = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
        content[70] = line + b"\n"
        (tmp_path / "a.jsonl").write_bytes(b"".join(content))
    return [str(tmp_path / f"a.{format}")]


@pytest.mark.parametrize("unit_bytes", [100, 1 << 20])
@pytest.mark.parametrize(
    "line, match",
    [
        (b'{"text": "a', "line 71: not JSON .*: mend or remove the line"),
        (b'{"text": "\xff"}', r"line 71: not UTF-8 text \(invalid start byte\)"),
        (b'{"body": "a", "id": 3}', "line 71: no text under 'text', it has 'body', 'id': name the field .*--text_field"),
        (b'{"text": null}', "line 71: no text under 'text'"),
        (b'["text"]', "line 71: no text under 'text', it is a list"),
    ],
)
def test_bad_line(tmp_path, line, match, unit_bytes):
    with pytest.raises(DataError, match=f"a.jsonl, {match}"):
        read(bad_line(tmp_path, line), unit_bytes)


@pytest.mark.parametrize("format", ["jsonl.gz", "jsonl.zst"])
def test_stream_cut_short(tmp_path, format):
    """The end of a file cut short must not be taken for the end of the data."""
    (inputs,) = bad_line(tmp_path, b"", format)
    with open(inputs, "rb+") as stream:
        stream.truncate(stream.seek(0, 2) - 20)
    with pytest.raises(DataError, match=r"a.jsonl.*, after line \d+: damaged or cut short .*: get the file again"):
        read([inputs], 1 << 20)


def test_bad_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(DataError, match=r"a.txt, line 3: not UTF-8 text .*: convert the file to UTF-8 or leave it out"):
        read([str(tmp_path)], 1 << 20)


def test_bad_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def refuses(match, column):
        if column is not None:
            pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet", row_group_size=2)
        with pytest.raises(DataError, match=match):
            read([str(tmp_path)], 1)

    refuses("a.parquet has no column 'text', it has 'body': name the column", {"body": ["a"]})
    refuses("a.parquet: column 'text' holds int64, not text: name the column", {"text": [1]})
    refuses("a.parquet, row 4: the text is null: remove the row", {"text": ["a", "b", "c", None]})
    raw = pyarrow.array([b"a", b"b", b"\xff"]).cast(pyarrow.string(), safe=False)
    refuses("a.parquet, row 3: not UTF-8 text", {"text": raw.view(pyarrow.string())})
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not a table")
    refuses("a.parquet is not a readable Parquet file .*: get the file again", None)
