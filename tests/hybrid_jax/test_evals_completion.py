"""Completion of documents: what counts as right, what is cut, and files of every kind and fault."""

import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

import hybrid_jax
from hybrid_jax import config
from hybrid_jax.data import DataError
from hybrid_jax.data.tokenizers import ByteTokenizer
from hybrid_jax.evals import completion
from hybrid_jax.evals.completion import contains, evaluate, read_rows
from tests.hybrid_jax.eval_models import small_model

TEXTS = ["The price of tea is", "  A longer document, about nothing: its colour is  ", "x" * 70]


@pytest.fixture(scope="module")
def model():
    return small_model(config.GLA(heads=2, conv_width=4), ByteTokenizer(), layers=1, ratio=None)


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_right_is_what_the_model_writes(model, tmp_path, monkeypatch):
    """A row is right with part of the greedy line as its value, and wrong with what is not in it."""
    prompts = [list(text.strip().encode())[-40:] for text in TEXTS]
    lines = [model.tokenizer.decode(tokens).split("\n")[0] for tokens in hybrid_jax.generate(model, prompts, max_new_tokens=8)]
    assert all(line.strip() for line in lines)
    rows = [{"text": text, "value": line.upper(), "doc_id": 1} for text, line in zip(TEXTS, lines, strict=True)]
    wrong = rows[:2] + [{"text": TEXTS[2], "value": "nothing that is written", "key": "k"}]
    files = [write_jsonl(tmp_path / "right.jsonl", rows), tmp_path / "wrong.parquet"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wrong), files[1])
    monkeypatch.setattr(completion, "NEW_TOKENS", 8)
    options = dict(max_length=48, batch=3)
    results = evaluate(model, files, **options)
    assert json.loads(json.dumps(results)) == results and list(results["scores"]) == [str(file) for file in files]
    right, some = results["scores"].values()
    assert right == {"contains": 1.0, "contains_stderr": 0.0, "rows": 3, "cut": 2}
    assert some["contains"] == pytest.approx(2 / 3) and some["contains_stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert results["average"] == pytest.approx(5 / 6) and results["settings"]["files"] == ["right.jsonl", "wrong.parquet"]
    few = evaluate(model, files[1:], limit=2, **options)
    assert few["average"] == 1.0 and few["scores"][str(files[1])]["rows"] == 2


def test_the_beginning_stands_before_every_text_and_is_cut_with_it(model, tmp_path, monkeypatch):
    file, read = write_jsonl(tmp_path / "rows.jsonl", [{"text": text, "value": "v"} for text in TEXTS]), []
    monkeypatch.setattr(completion, "write", lambda model, prompts, *_, **__: read.append(prompts) or [""] * len(prompts))
    results = evaluate(model, [file], max_length=48 + 60, beginning=257)
    short, longer, cut = (list(text.strip().encode()) for text in TEXTS)
    assert read == [[[257, *short], [257, *longer], cut[-60:]]]
    assert results["settings"]["beginning"] == 257 and results["scores"][str(file)]["cut"] == 1


def test_contains():
    assert contains("It is 3.5 (mg)", "3.5 (MG)") and contains(" K173887.", "k173887")
    assert not contains("It is 345", "3.5") and not contains("", "a")


FAULTS = {
    "no text": ('{"text": "a", "value": "b"}\n\n{"value": "b"}\n', "line 3: no text under 'text', only 'value'"),
    "no value": ('{"text": "a", "value": 5}\n', "line 1: no text under 'value', int 5"),
    "an empty value": ('{"text": "a", "value": " "}\n', "line 1: no text under 'value', str ' '"),
    "a list": ("[1]\n", "line 1: a list, needs an object with the fields text and value"),
    "not JSON": ('{"text": "a", "value": "b"}\nx\n', "line 2: not JSON"),
    "no rows": ("", "rows.jsonl holds no rows"),
}


@pytest.mark.parametrize("content, message", FAULTS.values(), ids=FAULTS.keys())
def test_faults_are_told_with_their_place(model, tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        evaluate(model, [tmp_path / "rows.jsonl"])


def test_files_that_are_none(model, tmp_path):
    for name, content, message in (
        ("a.parquet", b"PAR1", "a.parquet is not a readable Parquet file"),
        ("a.csv", b"text,value", "a.csv is of an unknown kind: give .jsonl or .parquet"),
        ("gone.jsonl", None, "gone.jsonl is no file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_rows(tmp_path / name))
    with pytest.raises(ValueError, match="max_length is 48, needs to be above 48"):
        evaluate(model, [], max_length=48)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        evaluate(SimpleNamespace(tokenizer=None), [])
