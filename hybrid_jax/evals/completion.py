"""Recall from real documents: a document, then a sentence about it that ends where a value of the document belongs.

The cloze form of FDA, SWDE and SQuAD of Arora et al., "Simple linear attention language models balance the recall-throughput
tradeoff" (2024), by the rules of their evaluation: a text goes on greedily to the end of its line, and counts as right
where the value is in that, in capitals or not.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hybrid_jax.data import DataError
from hybrid_jax.data.documents import readable_parquet
from hybrid_jax.evals.writing import write
from hybrid_jax.model import Model
from hybrid_jax.sampling import Sampling

FIELDS = ("text", "value")
NEW_TOKENS = 48  # at most, of what is written after a text


def evaluate(
    model: Model,
    files: Sequence[str | os.PathLike],
    *,
    max_length: int = 2048,
    batch: int = 8,
    limit: int | None = None,
    beginning: int | None = None,
) -> dict[str, Any]:
    """How often ``model`` completes the texts of ``files`` with their values.

    files: .jsonl or .parquet, as hazyresearch/based-fda, based-swde and based-squad are published: a text and a value a row.
    max_length: tokens of a prompt and of what is written after it; a longer text is cut on the left.
    batch: prompts written on at one time.
    limit: how many rows of each file are used; None: all.
    beginning: a token that stands before every text (see `harness.HarnessModel`), and is cut with it.

    Returns, ready for JSON, {"settings", "scores", "average"}: of each file the share that is right ("contains"), its standard error,
    the number of rows and of those that were cut. Raises DataError for a file that cannot be read, with the line and the field.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, and the files hold texts: set model.tokenizer")
    if max_length <= NEW_TOKENS:
        raise ValueError(f"max_length is {max_length}, needs to be above {NEW_TOKENS}, which are left for what is written")
    rows = {str(file): list(islice(read_rows(file), limit)) for file in files}  # all of them, before anything is computed
    if empty := [file for file, of_file in rows.items() if not of_file]:
        raise DataError(f"{empty[0]} holds no rows: give a file that does")
    first, room = ([] if beginning is None else [beginning]), max_length - NEW_TOKENS
    scores = {}
    for file, of_file in rows.items():
        prompts = [first + tokens for tokens in model.tokenizer.encode_batch([text for text, _ in of_file])]
        cut = [prompt[-room:] for prompt in prompts]
        written = write(model, cut, NEW_TOKENS, settings=Sampling(), stop=["\n"], batch=batch)
        right = [contains(text, value) for text, (_, value) in zip(written, of_file, strict=True)]
        share, count = sum(right) / len(right), len(right)
        scores[file] = {
            "contains": share,
            "contains_stderr": math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None,
            "rows": count,
            "cut": sum(len(prompt) > room for prompt in prompts),
        }
    names = [Path(file).name for file in rows]  # the average is theirs
    settings = {"files": names, "max_length": max_length, "max_new_tokens": NEW_TOKENS, "limit": limit, "beginning": beginning}
    return {"settings": settings, "scores": scores, "average": sum(score["contains"] for score in scores.values()) / len(scores)}


def contains(text: str, value: str) -> bool:
    """Whether ``value`` is in ``text``, in capitals or not."""
    return re.search(re.escape(value), text, re.IGNORECASE) is not None


def read_rows(file: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """(text, value) of every row of a .jsonl or .parquet file, without the space around them. Raises DataError."""
    name = os.fspath(file)
    if not os.path.isfile(name):
        raise DataError(f"{name} is no file: give .jsonl or .parquet files with the fields {' and '.join(FIELDS)}")
    if not name.endswith((".jsonl", ".parquet")):
        raise DataError(f"{name} is of an unknown kind: give .jsonl or .parquet files")
    for where, row in _parquet(name) if name.endswith(".parquet") else _jsonl(name):
        if not isinstance(row, dict):
            raise DataError(f"{name}, {where}: a {type(row).__name__}, needs an object with the fields {' and '.join(FIELDS)}")
        for field in FIELDS:
            if not isinstance(row.get(field), str) or not row[field].strip():
                held = f"{type(row[field]).__name__} {row[field]!r}" if field in row else f"only {', '.join(map(repr, row))}"
                raise DataError(f"{name}, {where}: no text under {field!r}, {held}: mend or remove the row")
        yield tuple(row[field].strip() for field in FIELDS)


def _jsonl(file: str) -> Iterator[tuple[str, Any]]:
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error}): mend or remove the line") from None


def _parquet(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    with readable_parquet(file):
        table = pyarrow.parquet.read_table(file)
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row
