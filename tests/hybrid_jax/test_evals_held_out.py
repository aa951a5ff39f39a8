"""Held-out losses at several lengths, against full forwards in float64, and against evaluation as training has it."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import config
from hybrid_jax.data import DataError
from hybrid_jax.evals import held_out
from hybrid_jax.evals.evaluate import make_evaluate, source_text
from hybrid_jax.evals.held_out import evaluate
from hybrid_jax.sharding import make_mesh
from tests.hybrid_jax.data_samples import array_source
from tests.hybrid_jax.eval_models import small_model
from tests.hybrid_jax.train_runs import small_run

SOURCE = array_source([30, 1, 70, 99])  # 200 tokens


@pytest.fixture(scope="module", params=["full", pytest.param("window", marks=pytest.mark.slow)])
def model(request):
    attention = config.Attention(heads=2, window=None if request.param == "full" else 24)
    return small_model(config.GLA(heads=2, conv_width=4), attention=attention, vocabulary=257)


def window_losses(model, length, scored):
    """Of every token, by a forward of its whole window: [scored] float64."""
    ids = np.concatenate([[256], SOURCE.read(0, scored)]).astype(np.int32)
    forward, losses = jax.jit(model), []
    for start in range(0, scored, length):
        row = np.zeros((1, 90), np.int32)  # padded after the window, which no causal model sees: one compilation
        width = min(length, scored - start)
        row[0, :width] = ids[start : start + width]
        logits = np.asarray(forward(row), np.float64)[0, :width]
        logits -= logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(width), ids[start + 1 : start + width + 1]])
    return losses


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    monkeypatch.setattr(held_out, "CHUNK", 16)


def test_the_same_tokens_at_every_length(model):
    results = evaluate(model, SOURCE, [90, 70], batch=2)
    assert results["settings"] == {"source": "a sample", "lengths": [70, 90], "tokens": 180, "bytes": len(source_text(SOURCE, 180))}
    assert json.loads(json.dumps(results)) == results and list(results["scores"]) == ["70", "90"]
    for length in (70, 90):
        expected, scores = window_losses(model, length, 180), results["scores"][str(length)]
        total = sum(losses.sum() for losses in expected)
        assert scores["loss"] == pytest.approx(total / 180, rel=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(total / 180), rel=1e-4)
        assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / results["settings"]["bytes"], rel=1e-5)
        for name, loss in scores["loss_by_position"].items():
            first, last = (int(name.split("-")[i]) for i in (0, -1))
            assert loss == pytest.approx(np.concatenate([losses[first : last + 1] for losses in expected]).mean(), rel=1e-5)
        assert len(scores["loss_by_position"]) == math.ceil(math.log2(length)) + 1


def test_at_the_training_length_it_is_the_evaluation_of_training(model):
    run = small_run(model={"vocabulary": 257}, data={"window": 70}, evaluation={"tokens": 140, "batch": 2})
    mesh = make_mesh(config.MeshConfig(), jax.devices()[:1])
    graph, params = nnx.split(model)
    with jax.set_mesh(mesh):
        in_training = make_evaluate(run, graph, mesh, SOURCE)(params)
    scores = evaluate(model, SOURCE, [70], tokens=140, batch=2)["scores"]["70"]
    assert (scores["loss"], scores["bits_per_byte"]) == pytest.approx((in_training["loss"], in_training["bits_per_byte"]), rel=1e-5)
    assert list(scores["loss_by_position"].values())[:2] == pytest.approx(in_training["loss_by_position"][:2], rel=1e-5)


MISTAKES = {
    "none": ([], {}, "give at least one, from 2 to 200"),
    "too short": ([1, 8], {}, "lengths 1, 8: give at least one, from 2 to 200"),
    "longer than the text": ([8, 201], {}, "lengths 8, 201: .* from 2 to 200, the tokens of a sample to score"),
    "longer than what is scored": ([64], {"tokens": 50}, "from 2 to 50"),
}


@pytest.mark.parametrize("lengths, options, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_told(lengths, options, message):
    small = SimpleNamespace(config=SimpleNamespace(vocabulary=61))
    with pytest.raises(DataError, match=message):
        evaluate(small, SOURCE, lengths, **options)
    with pytest.raises(DataError, match="vocabulary of 257, the model has 61"):
        evaluate(small, SOURCE, [8])


def test_a_picture(tmp_path):
    scores = {str(n): {"loss": 2.0, "loss_by_position": {"0": 3.0, "1": 2.5, f"2-{n - 1}": 2.0}} for n in (8, 64)}
    held_out.plot({"settings": {"tokens": 640}, "scores": scores}, tmp_path / "lengths.png", trained=16)
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
