"""Batches: each token of the text a target once an epoch, segments where documents are, and step n a function of (seed, n)."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.config import DataConfig
from hybrid_jax.data import DataError, mqar, pipeline
from hybrid_jax.data.build import build_store
from hybrid_jax.data.mix import Mix
from hybrid_jax.data.pipeline import evaluation_batches, mqar_evaluation_batches, training_batches
from hybrid_jax.data.sources import make_sources, mixed_sources
from hybrid_jax.data.store import TokenStore
from tests.hybrid_jax.data_samples import array_source, documents_of, texts, write_texts

TASK = mqar.Task(pairs=2, length=8, alphabet=10)
END = 256


def take(iterator, count):
    """The first ``count`` batches; the iterator is closed."""
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys() == {"tokens", "targets", "segment_ids", "weights"}
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def segments(batches):
    """Every segment of every row, in order: (tokens, targets), after checks of what holds for all of them."""
    for batch in batches:
        assert {name: array.dtype.name for name, array in batch.items()} == {
            "tokens": "int32", "targets": "int32", "segment_ids": "int32", "weights": "float32"
        }  # fmt: skip
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            real = ids > 0
            assert (real[:-1] >= real[1:]).all() and (np.diff(ids[real]) >= 0).all()  # padding last, ids never fall
            assert (batch["tokens"][row][~real] == 0).all() and (batch["weights"][row] == real).all()
            assert set(ids[real]) == set(range(1, 1 + len(set(ids[real]))))
            for segment in range(1, ids.max(initial=0) + 1):
                tokens, targets = (batch[name][row][ids == segment] for name in ("tokens", "targets"))
                np.testing.assert_array_equal(tokens[1:], targets[:-1])
                yield tokens, targets


sizes = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 30), st.integers(0, 3))


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_windows_against_brute_force(size):
    """Each window of the stream once an epoch; another order in the next."""
    lengths, T, seed = size
    source = array_source(lengths, seed)
    stream = np.concatenate([[END], source.tokens])
    windows = sorted((tuple(stream[i : i + T]), tuple(stream[i + 1 : i + T + 1])) for i in range(0, len(stream) - T, T))
    if not windows:
        return
    epochs = take(training_batches(source, batch=1, window=T, seed=seed), 2 * len(windows))
    for epoch in epochs[: len(windows)], epochs[len(windows) :]:
        assert sorted((tuple(tokens), tuple(targets)) for tokens, targets in segments(epoch)) == windows


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_documents_against_brute_force(size):
    """Put in order again, the rows are whole documents laid end to end and cut at every T; each epoch has an order of its own."""
    lengths, T, seed = size
    source = array_source(lengths, seed)
    rows = len(source) // T
    if not rows:
        return
    shuffled = pipeline.ShuffledDocuments(source, T, seed)
    batches = take(training_batches(source, batch=1, window=T, seed=seed, packing="documents"), 2 * rows)
    for epoch in 0, 1:
        place = {pipeline._shuffle(row, rows, seed, epoch): row for row in range(rows)}
        assert sorted(place) == list(range(rows))
        in_order = [batches[epoch * rows + place[row]] for row in range(rows)]
        order = shuffled._order(epoch)[0]
        assert sorted(order) == list(range(len(lengths)))
        starts = np.cumsum([0, *lengths])
        expected = []
        position = 0
        for document in order:
            targets = source.tokens[starts[document] : starts[document + 1]]
            tokens = np.concatenate([[END], targets[:-1]])
            for row in range(position // T, (position + len(targets) - 1) // T + 1):
                if row < rows:
                    part = slice(max(row * T - position, 0), (row + 1) * T - position)
                    expected.append((row, tokens[part].tolist(), targets[part].tolist()))
            position += len(targets)
        found = [(row, tokens.tolist(), targets.tolist()) for row in range(rows) for tokens, targets in segments([in_order[row]])]
        assert found == expected


@settings(deadline=None, max_examples=80)
@given(sizes, st.sampled_from(["windows", "documents"]), st.integers(1, 4))
def test_evaluation_predicts_every_token_once_in_order(size, packing, batch):
    lengths, T, seed = size
    source = array_source(lengths, seed)
    batches = take(evaluation_batches(source, batch=batch, window=T, packing=packing), 10**6)
    found = list(segments(batches))
    np.testing.assert_array_equal(np.concatenate([targets for _, targets in found]), source.tokens)
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in found]), [END, *source.tokens[:-1]])
    assert sum(batch["weights"].sum() for batch in batches) == len(source)
    assert len(batches) == -(-len(source) // (T * batch)) and all(len(b["tokens"]) == batch for b in batches)
    cuts = set(range(0, len(source), T)) | (set(source.documents.tolist()[:-1]) if packing == "documents" else set())
    assert np.cumsum([0, *[len(tokens) for tokens, _ in found]]).tolist() == [*sorted(cuts), len(source)]
    same(batches, take(evaluation_batches(source, batch=batch, window=T, packing=packing), 10**6))
    last = take(evaluation_batches(source, batch=batch, window=T, packing=packing, local=[batch - 1]), 10**6)
    same(last, [{name: rows[-1:] for name, rows in found.items()} for found in batches])


SOURCE = array_source(np.random.default_rng(1).integers(1, 60, 200).tolist())
OPTIONS = [
    dict(packing="windows"),
    dict(packing="documents"),
    dict(packing="windows", mqar_tasks=[TASK], mqar_share=0.3),
    dict(packing="documents", mqar_tasks=[TASK], mqar_share=1.0),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_step_n_depends_on_seed_and_n_alone(options, monkeypatch):
    """Any rows of the batches, started at any step, by any number of threads, over two ends of an epoch."""
    options = dict(source=SOURCE, batch=8, window=24, **options)
    steps = 2 * len(SOURCE) // (8 * 24) + 3
    reference = take(training_batches(seed=5, **options), steps)
    assert all(batch["tokens"].shape == (8, 24) for batch in reference)
    for local in [*range(8)], [0, 1, 4, 5], [7]:
        monkeypatch.setattr(pipeline, "THREADS", 1 + len(local))
        for start in 0, 1, steps // 2, steps - 1:
            found = take(training_batches(seed=5, start_step=start, local=local, **options), steps - start)
            same(found, [{name: rows[local] for name, rows in batch.items()} for batch in reference[start:]])
    other = take(training_batches(seed=6, **options), steps)
    assert all((a["tokens"] != b["tokens"]).any() for a, b in zip(reference, other, strict=True))


def test_far_steps_cost_no_more():
    """Step 10^9 is there at once; ``_order`` of one epoch, not of those before."""
    (batch,) = take(training_batches(SOURCE, batch=8, window=24, seed=0, packing="documents", start_step=10**9), 1)
    assert batch["weights"].all()


@pytest.mark.parametrize("packing", pipeline.PACKINGS)
def test_rows_are_shuffled(packing):
    """Rows of one epoch are in neither the source's order nor that of another epoch."""
    source = array_source([50] * 200)
    rows = len(source) // 50
    batches = take(training_batches(source, batch=rows, window=50, seed=0, packing=packing), 2)
    order = [[tuple(row) for row in batch["targets"]] for batch in batches]
    in_source = [tuple(row) for row in source.tokens.reshape(rows, 50)]
    for a, b in (order[0], in_source), (order[1], in_source), (order[0], order[1]):
        assert sorted(a) == sorted(b)
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 12  # 1 is expected of a permutation
        follows = sum(b[(b.index(x) + 1) % rows] == y for x, y in itertools.pairwise(a))
        assert follows < 12


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_mixture(share):
    """MQAR rows: the share asked for in every stretch, the text's epochs unbroken by them, MQAR problems all different."""
    options = dict(batch=10, window=24, seed=3)
    steps = 60
    mixed = take(training_batches(SOURCE, mqar_tasks=[TASK], mqar_share=share, **options), steps)
    text = take(training_batches(SOURCE, **options), steps)
    recall = np.concatenate([batch["weights"].sum(axis=1) < 24 for batch in mixed])
    counts = np.cumsum([0, *recall])
    for start in 0, 13, 200:
        assert abs(counts[start + 100] - counts[start] - 100 * share) <= 1
    rows = np.concatenate([batch["tokens"] for batch in mixed])
    np.testing.assert_array_equal(rows[~recall], np.concatenate([batch["tokens"] for batch in text])[: (~recall).sum()])
    assert len({row.tobytes() for row in rows[recall]}) == recall.sum() > 0
    other = take(training_batches(SOURCE, mqar_tasks=[TASK], mqar_share=share, **(options | dict(seed=4))), steps)
    assert not {row.tobytes() for row in rows[recall]} & {row.tobytes() for batch in other for row in batch["tokens"]}


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_a_mix_has_its_shares_and_each_part_the_rows_that_it_has_alone(packing):
    parts = [array_source([13, 30, 9, 48] * 6, seed=seed) for seed in (1, 2, 3)]
    shares = 0.5, 0.3, 0.2
    options = dict(batch=10, window=24, seed=3, packing=packing)
    whole = take(training_batches(Mix(parts, [5, 3, 2]), mqar_tasks=[TASK], mqar_share=0.1, **options), 40)
    text = np.concatenate([batch["weights"].sum(axis=1) == 24 for batch in whole])  # the other rows hold MQAR
    rows = np.concatenate([np.stack([batch["tokens"], batch["targets"]], axis=1) for batch in whole])[text]
    alone = [take(training_batches(part, **options), 30) for part in parts]  # several epochs
    alone = [np.concatenate([np.stack([batch["tokens"], batch["targets"]], axis=1) for batch in batches]) for batches in alone]
    counts = np.zeros(3, int)
    for number, row in enumerate(rows, 1):
        (part,) = [i for i in range(3) if np.array_equal(alone[i][counts[i]], row)]
        counts[part] += 1
        assert np.abs(counts - number * np.array(shares)).max() < 3
    later = take(training_batches(Mix(parts, shares), start_step=37, local=[2, 9], mqar_tasks=[TASK], mqar_share=0.1, **options), 3)
    same(later, [{name: x[[2, 9]] for name, x in batch.items()} for batch in whole[37:]])


def test_a_mix_reads_across_its_parts():
    parts = [array_source([5, 7], seed=1), array_source([4], seed=2), array_source([9, 3], seed=3)]
    mix, tokens = Mix(parts, [1, 1, 2]), np.concatenate([part.tokens for part in parts])
    ranges = [(0, 28), (11, 13), (12, 16), (3, 3), (15, 20)]
    for found, (start, stop) in zip(mix.read_ranges(ranges), ranges, strict=True):
        np.testing.assert_array_equal(found, tokens[start:stop])
    assert len(mix) == 28 and mix.documents.tolist() == [5, 12, 16, 25, 28] and [share for _, share in mix.parts] == [0.25, 0.25, 0.5]
    assert len({mix.fingerprint, Mix(parts, [1, 1, 1]).fingerprint, Mix(parts, [2, 2, 4]).fingerprint}) == 2
    with pytest.raises(DataError, match="a window of 10 tokens, but a sample holds 4"):
        training_batches(mix, batch=1, window=10, seed=0)
    parts[1].tokenizer = SimpleNamespace(name="words", fingerprint="another")
    with pytest.raises(DataError, match=r"are of different tokenizers \(bytes, words\): a mix needs one"):
        Mix(parts, [1, 1, 1])


def test_kinds_of_problems_take_turns():
    small, large = TASK, mqar.Task(pairs=4, length=20, alphabet=10)
    batches = take(training_batches(SOURCE, batch=6, window=24, seed=1, mqar_tasks=[small, large], mqar_share=1.0), 5)
    answers = np.concatenate([batch["weights"].sum(axis=1) for batch in batches])
    assert answers.tolist() == [3 * small.pairs, large.pairs] * 15
    alone = take(training_batches(SOURCE, batch=6, window=24, seed=1, mqar_tasks=[small], mqar_share=1.0), 5)
    np.testing.assert_array_equal(*(np.concatenate([batch["tokens"] for batch in of])[::2] for of in (batches, alone)))


def test_mixture_is_exact_after_many_rows():
    mixture = pipeline.Mixture(0.1, seed=0)
    for row in 0, 10**9, 10**15:
        counts = [mixture.count(row + i) - mixture.count(row) for i in range(1001)]
        assert 99 <= counts[-1] <= 101 and set(np.diff(counts)) == {0, 1}


def test_mqar_evaluation():
    options = dict(rows=11, batch=4, window=20, vocabulary=257)
    batches = take(mqar_evaluation_batches(TASK, **options), 10**6)
    assert len(batches) == 3
    rows = np.concatenate([batch["tokens"] for batch in batches])
    weights = np.concatenate([batch["weights"] for batch in batches])
    assert (weights.sum(axis=1) == [4] * 11 + [0]).all() and len({row.tobytes() for row in rows[:11]}) == 11
    some = take(mqar_evaluation_batches(TASK, local=[0, 3], **options), 10**6)
    same(some, [{name: rows[[0, 3]] for name, rows in batch.items()} for batch in batches])
    training = take(training_batches(SOURCE, batch=8, window=20, seed=0, mqar_tasks=[TASK], mqar_share=1.0), 20)
    assert not {row.tobytes() for batch in training for row in batch["tokens"]} & {row.tobytes() for row in rows}


def test_from_a_store(tmp_path):
    """The same batches as from memory."""
    write_texts(tmp_path / "in", texts(80))
    build_store([str(tmp_path / "in")], tmp_path / "store", validation_fraction=0.2)
    for split in make_sources(str(tmp_path / "store")):
        memory = array_source([1])
        memory.tokens, memory.documents = split.read(0, len(split)), split.documents
        for packing in pipeline.PACKINGS:
            options = dict(batch=2, window=100, packing=packing)
            same(take(training_batches(split, seed=0, **options), 40), take(training_batches(memory, seed=0, **options), 40))
            same(take(evaluation_batches(split, **options), 400), take(evaluation_batches(memory, **options), 400))
            found = [tokens for _, targets in segments(take(evaluation_batches(split, **options), 400)) for tokens in targets.tolist()]
            assert split.tokenizer.decode(found) == "".join(documents_of(split))


def test_stores_are_mixed_by_their_weights(tmp_path):
    """Both splits of each, in the order in which a configuration names them."""
    for name, count in ("a", 40), ("b", 60):
        write_texts(tmp_path / f"{name} in", texts(count))
        build_store([str(tmp_path / f"{name} in")], tmp_path / name, validation_fraction=0.3)
    sources = DataConfig(source=f"{tmp_path / 'b'}=1.5, {tmp_path / 'a'}=0.5").sources
    for split, mix in zip(("train", "validation"), mixed_sources(sources), strict=True):
        alone = [TokenStore.open(tmp_path / name, split) for name in ("b", "a")]
        assert [(part.name, share) for part, share in mix.parts] == [(alone[0].name, 0.75), (alone[1].name, 0.25)]
        assert len(mix) == sum(map(len, alone)) and mix.bytes == sum(part.bytes for part in alone)
    (train, _), (alone, _) = mixed_sources({str(tmp_path / "a"): 1.0}), make_sources(str(tmp_path / "a"))
    assert train.fingerprint == alone.fingerprint  # one is itself


def test_documents_are_shuffled():
    """Which documents share a row is another in each epoch, and for each seed."""
    orders = [tuple(pipeline.ShuffledDocuments(SOURCE, 24, seed)._order(epoch)[0]) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({*orders, tuple(range(200))}) == 4


def test_closed_iterators_leave_no_threads():
    import threading
    import time

    before = threading.active_count()
    for _ in range(5):
        iterator = training_batches(SOURCE, batch=8, window=24, seed=0)
        next(iterator)
        iterator.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_refused():
    def refuses(match, **changes):
        options = dict(source=SOURCE, batch=8, window=24, seed=0) | changes
        with pytest.raises(DataError, match=match) as error:
            training_batches(**options)
        assert "\n" not in str(error.value)

    refuses(r"a window of 100000 tokens, but a sample holds \d+: make the window shorter or give more text", window=100_000)
    refuses(r"rows \[6, 8\] of a batch of 8: give rows from 0 to 7", local=[6, 8])
    refuses("a batch of 0 rows", batch=0)
    refuses("packing 'tight': give one of windows, documents", packing="tight")
    refuses("an MQAR share of 0.5 with 0 tasks", mqar_share=0.5)
    refuses("an MQAR share of 1.5", mqar_share=1.5, mqar_tasks=[TASK])
    refuses("an MQAR problem of 8 tokens in a window of 7", window=7, mqar_share=0.5, mqar_tasks=[TASK])
    refuses("alphabet of 90 in a vocabulary of 257", mqar_share=0.5, mqar_tasks=[mqar.Task(pairs=2, length=8, alphabet=90)])
    with pytest.raises(DataError, match="a sample is empty: there is nothing to evaluate on"):
        evaluation_batches(array_source([]), batch=1, window=4)
