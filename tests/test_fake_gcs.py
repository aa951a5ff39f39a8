"""The stand-in for Cloud Storage, through TensorStore's own driver: what the tests of buckets stand on."""

import numpy as np
import pytest
import tensorstore as ts


@pytest.fixture
def store(gcs):
    return ts.KvStore.open(f"gs://{gcs.new_bucket()}/a folder/").result()


def test_read_write_delete(store):
    assert store.read("a").result().state == "missing"
    store.write("a", b"0123456789").result()
    assert store["a"] == b"0123456789"
    for part in slice(2, 5), slice(3, None), slice(-4, None), slice(0, 1):
        assert store.read("a", byte_range=part).result().value == b"0123456789"[part]
    store.write("empty", b"").result()
    assert store["empty"] == b""
    del store["a"]
    assert store.read("a").result().state == "missing"


def test_generations(store):
    first = store.write("a", b"1", if_equal=ts.KvStore.TimestampedStorageGeneration().generation).result()
    assert store.write("a", b"2", if_equal=first.generation).result().generation not in (first.generation, b"")
    assert store.read("a", if_not_equal=first.generation).result().value == b"2"
    now = store.read("a").result().stamp.generation
    assert store.read("a", if_not_equal=now).result().state == "unspecified"
    store.write("a", b"3", if_equal=first.generation).result()  # too late
    store.write("a", None, if_equal=first.generation).result()
    assert store["a"] == b"2"


def test_lists_in_pages(store, gcs):
    names = [f"x/{i:02d}%é" for i in range(30)]
    for name in [*names, "w", "y"]:
        store.write(name, b"1").result()
    assert sorted(store.list().result()) == sorted(name.encode() for name in [*names, "w", "y"])
    gcs.requests.clear()
    found = store.list(ts.KvStore.KeyRange("x/", "x0"), strip_prefix_length=2).result()
    assert sorted(found) == [name[2:].encode() for name in names]
    assert len(gcs.requests) == 5
    store.delete_range(ts.KvStore.KeyRange("x/", "x0")).result()
    assert sorted(store.list().result()) == [b"w", b"y"]


def test_large_object_and_failures(store, gcs):
    content = np.random.default_rng(0).bytes(20 << 20)
    gcs.failures[:] = [503]
    store.write("a", content).result()
    assert store["a"] == content
    assert not gcs.failures


def test_no_such_bucket(gcs):
    with pytest.raises(ValueError, match="NOT_FOUND"):
        ts.KvStore.open("gs://nobodys-bucket/").result().write("a", b"1").result()


def test_arrays(gcs):
    spec = {"driver": "zarr3", "kvstore": f"gs://{gcs.new_bucket()}/array/"}
    metadata = {"shape": [100], "data_type": "int32", "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [30]}}}
    array = ts.open(spec | {"metadata": metadata}, create=True).result()
    array[...] = np.arange(100, dtype=np.int32)
    np.testing.assert_array_equal(ts.open(spec).result().read().result(), np.arange(100))
    assert set(gcs.files(spec["kvstore"])) == {"zarr.json", *(f"c/{i}" for i in range(4))}
