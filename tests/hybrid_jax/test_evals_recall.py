"""MQAR over pairs and lengths, against the answers read off the model's logits."""

import jax
import numpy as np
import pytest

from hybrid_jax import build
from hybrid_jax.data import DataError, mqar, pipeline
from hybrid_jax.data.tokenizers import ByteTokenizer
from hybrid_jax.evals import processes, recall
from tests.hybrid_jax.train_runs import small_run


@pytest.fixture(scope="module")
def model():
    return build(small_run(model={"vocabulary": 64}).model, seed=1)


def test_shares_are_those_of_the_logits(model):
    found = recall.evaluate(model, pairs=(1, 2, 4), lengths=(8, 16), alphabet=6, examples=7, batch=3)
    assert found["settings"] == {"alphabet": 6, "examples": 7}
    assert list(found["scores"]) == ["1x8", "1x16", "2x8", "2x16", "4x16"]  # four pairs need sixteen tokens
    for name, share in found["scores"].items():
        pairs, length = map(int, name.split("x"))
        rows = next(pipeline.mqar_evaluation_batches(mqar.Task(pairs, length, 6), rows=7, batch=7, window=length, vocabulary=64))
        logits = np.asarray(model(rows["tokens"], rows["segment_ids"]))
        asked = rows["weights"] > 0
        assert asked.sum() == 7 * pairs
        assert share == pytest.approx((logits.argmax(-1) == rows["targets"])[asked].mean())


def test_processes_share_the_kinds(model, monkeypatch):
    """Each of two reads its own, the longest dealt out first, and both return what one alone does."""
    options = {"pairs": (1, 2, 4), "lengths": (8, 16), "alphabet": 6, "examples": 7, "batch": 3}
    alone = recall.evaluate(model, **options)
    read, parts, make = [], [None, None], pipeline.mqar_evaluation_batches
    monkeypatch.setattr(pipeline, "mqar_evaluation_batches", lambda task, **rest: read.append(task) or make(task, **rest))
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def evaluate(process):
        read.clear()
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(processes, "gather", lambda content: parts.__setitem__(process, content) or parts)
        return recall.evaluate(model, **options), [f"{task.pairs}x{task.length}" for task in read]

    with pytest.raises(TypeError):
        evaluate(0)  # to know its part: the other's is not there yet
    results = [evaluate(process) for process in (1, 0)]
    assert [found for found, _ in results] == [alone, alone]
    assert [kinds for _, kinds in results] == [["2x16", "1x8"], ["1x16", "4x16", "2x8"]]


def test_symbols_are_those_of_the_tokenizer(model):
    """In training they are the rarest tokens of the data's vocabulary, whatever the model's size."""
    wide = build(small_run(model={"vocabulary": 300}).model)
    without = recall.evaluate(wide, pairs=[2], lengths=[8], alphabet=6)["scores"]
    wide.tokenizer = ByteTokenizer()
    assert recall.evaluate(wide, pairs=[2], lengths=[8], alphabet=6)["scores"] != without


def test_refused(model):
    with pytest.raises(DataError, match="no MQAR problem has 4 or 9 pairs in 8 or 15 tokens of an alphabet of 6: give lengths"):
        recall.evaluate(model, pairs=[4, 9], lengths=[8, 15], alphabet=6)
    with pytest.raises(DataError, match="give an alphabet of at most 21"):
        recall.evaluate(model, pairs=[4], lengths=[16], alphabet=22)
