"""Multi-query associative recall over numbers of pairs and lengths, those of training and others."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from hybrid_jax.data import DataError, mqar, pipeline
from hybrid_jax.evals.processes import on_local_devices, rows_at_once, shared
from hybrid_jax.loss import batch_losses
from hybrid_jax.model import Model
from hybrid_jax.sharding import batch_sharding


def evaluate(
    model: Model, *, pairs: Sequence[int], lengths: Sequence[int], alphabet: int, examples: int = 256, batch: int = 32
) -> dict[str, Any]:
    """The share of answers that ``model`` has right, for every number of pairs and length in tokens that go together.

    pairs, lengths: of :class:`hybrid_jax.data.mqar.Task`; a length under 4 * pairs, or more pairs than the alphabet, is left out.
    alphabet: how many keys, values and fillers there are; the one that the model was trained on.
    examples: problems of each kind, the same for every model. batch: how many each device reads at once. In a run of several
        processes each takes some of the kinds, and all return all results.

    Returns {"settings": ..., "scores": {"PAIRSxLENGTH": share}}. Raises DataError where no problem is left, or the alphabet is too
    large for the vocabulary.
    """
    tasks = list(_tasks(pairs, lengths, alphabet))
    if not tasks:
        raise DataError(
            f"no MQAR problem has {_several(pairs)} pairs in {_several(lengths)} tokens of an alphabet of {alphabet}: "
            "give lengths >= 4 * pairs, and pairs <= alphabet"
        )
    vocabulary = model.tokenizer.vocabulary if model.tokenizer else model.config.vocabulary
    for task in tasks:
        task.check(task.length, vocabulary)  # here, that every process raises it, and none waits for one that did
    shares = shared(partial(_shares, model, vocabulary, examples, batch), tasks, size=lambda task: task.length)
    scores = {f"{task.pairs}x{task.length}": share for task, share in zip(tasks, shares, strict=True)}
    return {"settings": {"alphabet": alphabet, "examples": examples}, "scores": scores}


def _shares(model: Model, vocabulary: int, examples: int, batch: int, tasks: list[mqar.Task]) -> list[float]:
    """The share of answers that are right of each task, computed by this process alone."""
    mesh, model = on_local_devices(model)
    graph, params = nnx.split(model)
    rows_together = rows_at_once(mesh, batch, examples)

    @jax.jit
    def answers(params, rows):
        losses = batch_losses(nnx.merge(graph, params), rows)
        return losses.correct, losses.weight

    def share(task: mqar.Task) -> float:
        options = {"rows": examples, "batch": rows_together, "window": task.length, "vocabulary": vocabulary}
        batches = pipeline.mqar_evaluation_batches(task, **options)
        with jax.set_mesh(mesh):
            found = [jax.device_get(answers(params, jax.device_put(rows, batch_sharding(mesh)))) for rows in batches]
        right, asked = np.sum(found, axis=0, dtype=np.float64)
        return float(right / asked)

    return [share(task) for task in tasks]


def _tasks(pairs: Sequence[int], lengths: Sequence[int], alphabet: int) -> Iterator[mqar.Task]:
    for P in pairs:
        for L in lengths:
            if L >= 4 * P and P <= alphabet:
                yield mqar.Task(P, L, alphabet)


def _several(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
