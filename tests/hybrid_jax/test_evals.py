"""Evaluation against the model's own logits, token by token in float64."""

import dataclasses
import lzma
import math

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from hybrid_jax import build
from hybrid_jax.config import MeshConfig
from hybrid_jax.data import DataError, mqar, pipeline
from hybrid_jax.data.mix import Mix
from hybrid_jax.data.token_source import ArraySource
from hybrid_jax.data.tokenizers import ByteTokenizer, tokenizer_from_files
from hybrid_jax.evals.baselines import unigram_bits_per_byte, xz_bits_per_byte
from hybrid_jax.evals.evaluate import make_evaluate, source_text
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.summary import evaluation_rows
from tests.hybrid_jax.data_samples import array_source
from tests.hybrid_jax.train_runs import small_run

DOCUMENTS = [b"def f(x):\n    return x\n", b"\xff\xfe not text", b"", b"import os\n" * 5]


def held_out():
    tokens = np.concatenate([[*document, 256] for document in DOCUMENTS]).astype(np.uint16)
    ends = np.cumsum([len(document) + 1 for document in DOCUMENTS])
    return ArraySource(tokens, ends, tokenizer=ByteTokenizer(), bytes=sum(map(len, DOCUMENTS)), name="held out")


def run_for(packing="windows", tokens=10**6, **changes):
    return small_run(
        model={"vocabulary": 300},
        data={"window": 16, "packing": packing, "mqar": {"pairs": 2, "length": 8, "alphabet": 5, "examples": 5, "share": 0.1}},
        evaluation={"tokens": tokens, "batch": 2},
        **changes,
    )


@pytest.fixture(scope="module")
def model():
    return build(run_for().model, seed=3)


def losses_and_hits(model, batch):
    """Of every scored token, in float64 from the logits: (loss, whether the target is the likeliest, place in the window)."""
    logits = np.asarray(model(batch["tokens"], batch["segment_ids"]), np.float64)
    log_probabilities = logits - logits.max(-1, keepdims=True)
    log_probabilities -= np.log(np.exp(log_probabilities).sum(-1, keepdims=True))
    rows, places = np.nonzero(batch["weights"])
    targets = batch["targets"][rows, places]
    return -log_probabilities[rows, places, targets], logits[rows, places].argmax(-1) == targets, places


def evaluate(run, model, sizes=None, source=None):
    mesh = make_mesh(MeshConfig(**sizes)) if sizes else make_mesh(MeshConfig(), jax.devices()[:1])
    graph, params = nnx.split(model)
    with jax.set_mesh(mesh):
        return make_evaluate(run, graph, mesh, source or held_out())(params)


@pytest.mark.parametrize(("packing", "sizes"), [("windows", None), ("documents", None), ("windows", dict(data=2, fsdp=2, tensor=2))])
def test_the_numbers_are_those_of_the_logits(model, packing, sizes):
    results = evaluate(run_for(packing), model, sizes)
    source = held_out()
    batches = pipeline.evaluation_batches(source, batch=100, window=16, packing=packing)
    losses, _, places = losses_and_hits(model, next(batches))
    assert results["tokens"] == len(source) == len(losses) and results["bytes"] == sum(map(len, DOCUMENTS))
    assert results["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / results["bytes"], rel=1e-6)
    by_position = [losses[places == place].mean() for place in range(16)]
    np.testing.assert_allclose(results["loss_by_position"], by_position, rtol=1e-5)

    task = mqar.Task(2, 8, 5)
    problems = next(pipeline.mqar_evaluation_batches(task, rows=3, batch=3, window=16, vocabulary=257))  # two a row: five and one more
    losses, hits, _ = losses_and_hits(model, problems)
    assert len(losses) == 6 * 2
    assert results["mqar_accuracy"] == pytest.approx(hits.mean())
    assert results["mqar_loss"] == pytest.approx(losses.mean(), rel=1e-6)


def test_text_is_compressed_once_and_not_before_it_is_evaluated(model, monkeypatch):
    """A start of a run that has ended, or has long to go, does not wait for it."""
    compressed = []
    monkeypatch.setattr("hybrid_jax.evals.evaluate.xz_bits_per_byte", lambda text: compressed.append(len(text)) or 1.0)
    graph, params = nnx.split(model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        evaluate = make_evaluate(run_for(), graph, mesh, held_out())
        assert not compressed
        assert evaluate(params) == evaluate(params) and compressed == [sum(map(len, DOCUMENTS))]


def test_each_part_of_a_mix_is_evaluated_and_their_mean_by_shares(model):
    parts = [held_out(), array_source([30, 11], seed=1)]
    parts[1].name = "another"
    results = evaluate(run_for(tokens=35), model, source=Mix(parts, [3, 1]))
    losses = [losses_and_hits(model, next(pipeline.evaluation_batches(part, batch=3, window=16, tokens=35)))[0] for part in parts]
    of_parts = [results["parts"][part.name] for part in parts]
    assert [one["tokens"] for one in of_parts] == [35, 35] and results["tokens"] == 70
    assert [one["loss"] for one in of_parts] == pytest.approx([one.mean() for one in losses], rel=1e-6)
    for name in ("loss", "bits_per_byte", "xz_bits_per_byte"):
        assert results[name] == pytest.approx(0.75 * of_parts[0][name] + 0.25 * of_parts[1][name])
    assert results["loss_by_position"][0] == pytest.approx(0.75 * losses[0][::16].mean() + 0.25 * losses[1][::16].mean(), rel=1e-5)
    assert "mqar_loss" in results and "mqar_loss" not in of_parts[0]
    assert f"{of_parts[1]['loss']:.4f} nats a token" in dict(evaluation_rows(results))["  another"]


def test_recall_is_over_the_problems_of_all_kinds(model):
    def recall(pairs, length):
        run = run_for()
        kinds = dataclasses.replace(run.data.mqar, pairs=pairs, length=length, examples=4)
        return evaluate(dataclasses.replace(run, data=dataclasses.replace(run.data, mqar=kinds)), model)

    both, small, large = recall((1, 4), (8, 16)), recall((1,), (8,)), recall((4,), (16,))
    for name in ("mqar_accuracy", "mqar_loss"):
        assert both[name] == pytest.approx((small[name] + 4 * large[name]) / 5, rel=1e-6)  # of one and of four answers a problem


@pytest.mark.parametrize("sizes", [None, dict(data=8, fsdp=1)])
def test_part_of_the_text_is_as_much_on_any_mesh_and_its_own_bytes(model, sizes):
    results = evaluate(run_for(tokens=40), model, sizes)
    assert results["tokens"] == 40 and results["bytes"] == len(source_text(held_out(), 40))
    losses, _, _ = losses_and_hits(model, next(pipeline.evaluation_batches(held_out(), batch=4, window=16)))
    assert results["loss"] == pytest.approx(losses[:40].mean(), rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(losses[:40].sum() / math.log(2) / results["bytes"], rel=1e-6)


def test_a_process_reads_its_own_rows_alone(model, monkeypatch):
    """Of batches of four the last two: of the text, and of the recall problems."""
    read = []

    class Rows:
        numbers = [2, 3]

        def __init__(self, mesh, batch):
            assert batch == 4

        def to_mesh(self, arrays):
            read.append(arrays["targets"])
            return {name: np.concatenate([array, array]) for name, array in arrays.items()}

    monkeypatch.setattr("hybrid_jax.evals.evaluate.LocalRows", Rows)
    run = run_for()
    evaluate(dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, batch=4)), model)
    task = mqar.Task(2, 8, 5)
    text = pipeline.evaluation_batches(held_out(), batch=4, window=16)
    recall = pipeline.mqar_evaluation_batches(task, rows=3, batch=4, window=16, vocabulary=257)
    expected = [batch["targets"][2:] for batches in (text, recall) for batch in batches]
    assert len(read) == len(expected) > 2
    for found, rows in zip(read, expected, strict=True):
        np.testing.assert_array_equal(found, rows)


def test_places_where_nothing_is_scored_are_none(model):
    results = evaluate(run_for(tokens=3), model)
    assert results["tokens"] == 3 and [x is None for x in results["loss_by_position"]] == [False] * 3 + [True] * 13
    long = small_run(model={"vocabulary": 300}, data={"window": 128}, evaluation={"batch": 1})
    results = evaluate(long, model)
    assert len(results["loss_by_position"]) == 128
    assert [x is None for x in results["loss_by_position"]] == [place >= len(held_out()) for place in range(128)]


def test_recall_is_of_runs_that_train_on_it_and_fits(model):
    never = small_run(model={"vocabulary": 300}, data={"window": 16}, evaluation={"batch": 2})
    results = evaluate(never, model)  # all of a row is one segment, and there are no masks
    assert "mqar_accuracy" not in results
    losses, _, _ = losses_and_hits(model, next(pipeline.evaluation_batches(held_out(), batch=100, window=16)))
    assert results["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    wide = small_run(model={"vocabulary": 300}, data={"window": 16, "mqar": {"length": 16, "alphabet": 200, "share": 0.5}})
    with pytest.raises(DataError, match="alphabet"):
        evaluate(wide, model)


def test_the_text_is_the_bytes_without_document_ends():
    assert source_text(held_out(), len(held_out())) == b"".join(DOCUMENTS)
    assert source_text(held_out(), 25) == b"".join(DOCUMENTS)[:24]


def test_the_text_has_no_space_that_a_tokenizer_sets_before_it():
    texts = ["a few words", "", "and some more", "last"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "?": 1}, unk_token="?"))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    made.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=["</s>", "?"], show_progress=False))
    tokenizer = tokenizer_from_files(made.to_str().encode(), None, name="tokenizer.json")
    documents = [[*ids, tokenizer.document_end] for ids in tokenizer.encode_batch(texts)]
    ends, expected = np.cumsum([len(ids) for ids in documents]), "".join(texts).encode()
    source = ArraySource(np.concatenate(documents), ends, tokenizer=tokenizer, bytes=len(expected), name="words")
    assert source_text(source, len(source)) == expected
    assert source_text(source, 7) == b"a few wordsand some"  # five of a document and its end, an empty one, two words


def test_baselines():
    text = b"aabb" * 100
    assert unigram_bits_per_byte(text) == pytest.approx(1.0)
    assert unigram_bits_per_byte(b"a" * 10) == 0
    assert xz_bits_per_byte(text) == pytest.approx(8 * len(lzma.compress(text, preset=9)) / 400)
    assert xz_bits_per_byte(np.random.default_rng(0).bytes(5000)) > 8
