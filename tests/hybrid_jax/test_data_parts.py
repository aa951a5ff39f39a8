"""Parts: a part is what was put into it; what is missing, doubled, changed or damaged is found and named."""

import dataclasses
import random
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.data import DataError, parts
from hybrid_jax.data.build import _share, build_store
from hybrid_jax.data.documents import Unit, find_files, plan_units
from hybrid_jax.data.folders import open_folder
from hybrid_jax.data.inputs import File
from tests.hybrid_jax.data_samples import texts, write_jsonl, write_parquet, write_texts

FILES = [File(f"/{name}", 100, 5) for name in ("a.jsonl", "b.txt", "c.parquet")]
UNITS = [
    Unit(FILES[:1], 0, 60, 100, 60),
    Unit(FILES[:1], 60, 100, 100, 40),
    Unit(FILES[1:2], 0, 1, 1, 100),
    Unit(FILES[2:], 0, 3, 7, 40),
    Unit(FILES[2:], 3, 7, 7, 60),
]


def record(unit):
    return {"files": [list(file) for file in unit.files], "start": unit.start, "stop": unit.stop, "end": unit.end}


def test_round_trip(tmp_path, monkeypatch):
    """Over several blocks, some without one of the splits."""
    monkeypatch.setattr(parts, "BLOCK_BYTES", 60)
    rng = np.random.default_rng(0)
    folder, documents = open_folder(tmp_path), {split: [] for split in parts.SPLITS}
    for unit in UNITS:
        writer = parts.Writer(folder, unit)
        for _ in range(rng.integers(0, 12)):
            split, tokens = rng.choice(parts.SPLITS), rng.integers(0, 99, rng.integers(1, 40)).astype(np.uint16)
            documents[split].append(tokens)
            writer.add(split, tokens, 3)
        assert parts.name_of(unit) not in parts.finished(folder)
        writer.close()
    names = [parts.name_of(unit) for unit in UNITS]
    assert parts.finished(folder) == set(names)
    records = parts.read_records(folder, names)
    assert [record(unit) for unit in UNITS] == [{key: held[key] for key in record(UNITS[0])} for held in records]
    assert max(len(held["blocks"]) for held in records) > 2
    for split in parts.SPLITS:
        tokens = np.concatenate(list(parts.read_array(folder, names, records, f"{split}.tokens", np.dtype(np.uint16))))
        lengths = np.concatenate(list(parts.read_array(folder, names, records, f"{split}.lengths", np.dtype(np.int64))))
        np.testing.assert_array_equal(tokens, np.concatenate(documents[split]))
        np.testing.assert_array_equal(lengths, [len(tokens) for tokens in documents[split]])
        counts = {name: sum(held["splits"][split][name] for held in records) for name in parts.COUNTS}
        assert counts == {"tokens": len(tokens), "documents": len(lengths), "bytes": 3 * len(lengths)}


def test_exactly_the_files():
    parts.check_records([record(unit) for unit in UNITS], FILES)
    for shuffled in range(5):
        parts.check_records([record(unit) for unit in random.Random(shuffled).sample(UNITS, len(UNITS))], FILES)

    def refuses(match, units, files=FILES):
        with pytest.raises(DataError, match=match):
            parts.check_records([record(unit) for unit in units], files)

    refuses("/b.txt is new since the store was begun", UNITS[:2] + UNITS[3:])
    refuses("/a.jsonl is missing in the parts of the store, from 0 to 60", UNITS[1:])
    refuses("/c.parquet is missing in the parts of the store, from 3 to 7", UNITS[:-1])
    refuses("/b.txt is twice in the parts of the store, from 0 to 1", [*UNITS, UNITS[2]])
    refuses("/a.jsonl is twice in the parts of the store, from 50 to 60", [UNITS[0], dataclasses.replace(UNITS[1], start=50), *UNITS[2:]])
    refuses("/b.txt was changed while the store was built", UNITS, [FILES[0], FILES[1]._replace(modified=6), FILES[2]])
    refuses("/b.txt was changed while the store was built", UNITS, [FILES[0], FILES[1]._replace(size=6), FILES[2]])
    refuses("/b.txt was read for the store and is not there any more", UNITS, [FILES[0], FILES[2]])


@settings(deadline=None, max_examples=100)
@given(sizes=st.lists(st.integers(0, 1000), max_size=40), shards=st.integers(1, 9))
def test_shares(sizes, shards):
    """Each unit in one share, and no two shares further apart than the largest unit."""
    units = {str(i): Unit((File(str(i), size, 0),), 0, 1, 1, size) for i, size in enumerate(sizes)}
    shares = [_share(units, i, shards) for i in range(shards)]
    assert sorted(name for share in shares for name in share) == sorted(units)
    totals = [sum(unit.size for unit in share.values()) for share in shares]
    assert max(totals) - min(totals) <= max(sizes, default=0)


def content(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def inputs(tmp_path):
    documents = texts(150)
    write_texts(tmp_path / "in" / "txt", documents[:40])
    write_jsonl(tmp_path / "in" / "a.jsonl", documents[40:90])
    write_jsonl(tmp_path / "in" / "empty.jsonl", [])
    write_parquet(tmp_path / "in" / "b.parquet", documents[90:], rows_a_group=9)
    pyarrow.parquet.ParquetWriter(tmp_path / "in" / "none.parquet", pyarrow.schema({"text": pyarrow.null()})).close()
    return [str(tmp_path / "in")]


OPTIONS = {"validation_fraction": 0.2, "unit_bytes": 6000}


def build_all_but_the_last(inputs, output) -> dict:
    return [build_store(inputs, output, shard=(i, 3), **OPTIONS) for i in range(2)][-1]


@pytest.mark.parametrize("shards", [2, 12])
def test_shards_give_the_store_of_one(inputs, tmp_path, shards):
    """The last one finishes it, without a word to it; there may be more of them than parts."""
    whole = build_store(inputs, tmp_path / "whole", **OPTIONS)
    order = [i for i in range(shards) if i != 1] + [1]
    results = [build_store(inputs, tmp_path / "store", shard=(i, shards), **OPTIONS) for i in order]
    assert [result["complete"] for result in results] == [False] * (shards - 1) + [True] and results[-1] == whole
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert not (tmp_path / "store" / "parts").exists()


def test_without_shard_makes_what_is_missing(inputs, tmp_path):
    result = build_all_but_the_last(inputs, tmp_path / "store")
    names = {parts.name_of(unit) for unit in plan_units(find_files(inputs), 6000)}
    assert not result["complete"] and 0 < len(result["missing"]) < result["parts"] == len(names)
    assert len(parts.finished(open_folder(tmp_path / "store"))) == len(names) - len(result["missing"])
    made = []
    build_store(inputs, tmp_path / "store", progress=lambda *now: made.append(now), **OPTIONS)
    assert made[0][1] > made[0][2] / 2  # what the shards had made
    build_store(inputs, tmp_path / "whole", **OPTIONS)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_parts_that_are_not_what_they_were(inputs, tmp_path):
    """Bits that changed, a block that is gone, a record that lies: found before the store says that it is complete."""
    build_all_but_the_last(inputs, tmp_path / "begun")

    def refuses(match, change):
        store = tmp_path / "damaged"
        shutil.copytree(tmp_path / "begun", store)
        change(store / "parts")
        with pytest.raises(DataError, match=match) as error:
            build_store(inputs, store, **OPTIONS)
        assert "\n" not in str(error.value) and b'"complete": false' in (store / "manifest.json").read_bytes()
        shutil.rmtree(store)

    def flip(folder):
        file = next(folder.glob("tokens/*/train.tokens.0"))
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])

    def lie(folder):
        file = next(file for file in folder.glob("records/*") if b'"train": {"tokens": 0' not in file.read_bytes())
        file.write_bytes(file.read_bytes().replace(b'"train": {"tokens": ', b'"train": {"tokens": 1'))

    refuses("train.tokens.0, made of .*, is damaged: delete parts/ in the folder of the store and run", flip)
    refuses("train.tokens.0 is not there any more: delete parts/", lambda folder: next(folder.glob("tokens/*/train.tokens.0")).unlink())
    refuses("the parts hold other than the .* items that their records say of .*train/tokens/: delete parts/", lie)
