"""The tables of rows in docs/ are those that the rows give."""

import json
import re

import pytest

from experiments.benchmarks import results, tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_pages_have_the_tables_of_the_rows(page):
    text = page.read_text()
    assert re.findall(r"<!-- table (\w+) -->", text)
    assert tables.written(text) == text, "run python -m experiments.benchmarks.tables"


def test_the_newest_row_of_a_case_counts_and_failures_do_not(tmp_path, monkeypatch):
    case = {"suite": "tpu_step", "config": "gla_r6:340m", "target": "tpu:v6e", "time": "2026-11-22"}
    others = [{"held_bytes": 1e9, "time": "2026-11-21"}, {"failure": "no"}, {"suite": "other", "held_bytes": 3e9}]
    rows = [case | {"held_bytes": 2e9}, *(case | other for other in others)]
    (tmp_path / "tpu_static.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "Before\n\n<!-- table tpu_steps -->\n| old |\n<!-- end -->\nafter\n"
    table = "|  | v4 | v5e | v5p | v6e | tpu7x |\n|---|---|---|---|---|---|\n| `gla_r6:340m` |  |  |  | 2.0 |  |\n"
    assert tables.written(page) == page.replace("| old |\n", table)


def test_a_row_cut_short_counts_as_none_and_takes_none_with_it(tmp_path):
    file = tmp_path / "results" / "rows.jsonl"
    assert results.read(file) == []
    for number in range(3):
        results.append({"n": number}, file)
    assert file.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    for cut, left in ((-3, 2), (-1, 3)):  # in the middle of the last row; before its newline, with all of it written
        whole = file.read_bytes()
        file.write_bytes(whole[:cut])
        assert len(results.read(file)) == left
        results.append({"n": 3}, file)
        assert results.read(file) == [{"n": number} for number in range(left)] + [{"n": 3}]
        file.write_bytes(whole)
