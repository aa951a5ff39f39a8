"""What a model is measured by, during training and after: held-out text and multi-query associative recall."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.config import RunConfig
from hybrid_jax.data import mqar, pipeline
from hybrid_jax.data.token_source import TokenSource
from hybrid_jax.data.tokenizers import ByteTokenizer
from hybrid_jax.evals.baselines import unigram_bits_per_byte, xz_bits_per_byte
from hybrid_jax.loss import Losses, batch_losses
from hybrid_jax.train.feed import LocalRows, fields

Evaluate = Callable[..., dict[str, Any] | None]


def make_evaluate(config: RunConfig, graph: nnx.GraphDef, mesh: Mesh, held_out: TokenSource) -> Evaluate:
    """A function of parameters that evaluates them on the first ``evaluation.tokens`` tokens of ``held_out``, whatever the mesh.

    Between two batches it asks ``stopped``, its second argument, and returns None where that says so; else, ready for JSON:
        loss                nats a token, each seen with what precedes it in its window
        bits_per_byte       the same in bits, a byte of the text (the ends of documents are paid for, and are no bytes)
        xz_bits_per_byte, unigram_bits_per_byte    of the same bytes
        loss_by_position    [T] nats at each place in the window (None where nothing is scored)
        tokens, bytes       how many were scored, and of how much text they are
        mqar_accuracy, mqar_loss    over the answers of held-out recall problems, as many of each of the run's kinds; left out
                            where it trains on none
    Of a mix each part is evaluated on as many tokens of its own: its numbers are under its name in ``parts``, and those above are their
    means by the parts' shares, tokens and bytes the sums.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-config.evaluation.batch // devices) * devices
    window, packing = config.data.window, config.data.packing
    tasks = _recall_tasks(config, held_out.tokenizer.vocabulary)
    names = fields(config)  # as in training, so that the operators, and their kernels, are those of training

    def about(source: TokenSource) -> tuple[dict[str, int], Callable[[], dict[str, float]]]:
        text = source_text(source, scored := min(config.evaluation.tokens, len(source)))
        # Not before there is something to hold against them: xz takes seconds.
        baselines = cache(lambda: {"xz_bits_per_byte": xz_bits_per_byte(text), "unigram_bits_per_byte": unigram_bits_per_byte(text)})
        return {"tokens": scored, "bytes": len(text)}, baselines

    texts = [(source, share, *about(source)) for source, share in held_out.parts]

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))  # every process can read them
    def losses(params: nnx.State, batch: dict) -> Losses:
        return batch_losses(nnx.merge(graph, params), batch)

    local = LocalRows(mesh, rows)

    def sums(params: nnx.State, batches: Iterator[dict], steps: int, stopped: Callable[[], bool]) -> Losses:
        parts, under_way = [], []
        with closing(batches):
            for _, batch in zip(range(steps), batches, strict=False):
                under_way.append(losses(params, local.to_mesh({name: batch[name] for name in names})))
                parts += jax.device_get(under_way[:-1])  # when the next one is under way, so that the devices never wait for the host
                under_way = under_way[-1:]
                if stopped():
                    raise _Stopped
        parts += jax.device_get(under_way)
        return Losses(*(np.sum([np.asarray(x, np.float64) for x in part], axis=0) for part in zip(*parts, strict=True)))

    def task_sums(params: nnx.State, task: mqar.Task, stopped: Callable[[], bool]) -> Losses:
        problem_rows = -(-config.data.mqar.examples // (window // task.length))
        batches = pipeline.mqar_evaluation_batches(
            task, rows=problem_rows, batch=rows, window=window, vocabulary=held_out.tokenizer.vocabulary, local=local.numbers
        )
        return sums(params, batches, -(-problem_rows // rows), stopped)

    def of_text(params: nnx.State, source: TokenSource, about: dict, baselines: Callable, stopped: Callable[[], bool]) -> dict[str, Any]:
        options = {"batch": rows, "window": window, "packing": packing, "tokens": about["tokens"], "local": local.numbers}
        batches = pipeline.evaluation_batches(source, **options)
        found = sums(params, batches, -(-about["tokens"] // (rows * window)), stopped)
        with np.errstate(invalid="ignore"):
            by_position = found.total_by_position / found.weight_by_position
        return {
            "loss": float(found.total / found.weight),
            "bits_per_byte": float(found.total / math.log(2) / about["bytes"]),
            **about,
            **baselines(),
            "loss_by_position": [float(x) if math.isfinite(x) else None for x in by_position],
        }

    def measure(params: nnx.State, stopped: Callable[[], bool]) -> dict[str, Any]:
        found = {source.name: of_text(params, source, *known, stopped) for source, _, *known in texts}
        results = _mean(found, [share for _, share, *_ in texts]) if len(texts) > 1 else found[held_out.name]
        if tasks:
            recall = jax.tree.map(lambda *parts: sum(parts), *(task_sums(params, task, stopped) for task in tasks))
            results |= {"mqar_accuracy": float(recall.correct / recall.weight), "mqar_loss": float(recall.total / recall.weight)}
        return results

    def evaluate(params: nnx.State, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        try:
            return measure(params, stopped)
        except _Stopped:
            return None

    return evaluate


def _mean(of_parts: dict[str, dict[str, Any]], shares: list[float]) -> dict[str, Any]:
    """The results of a mix of parts with ``shares``, and those of each part beside them."""

    def mean(values: Sequence[float | None]) -> float | None:
        return None if None in values else sum(share * value for share, value in zip(shares, values, strict=True))

    columns = {name: [results[name] for results in of_parts.values()] for name in next(iter(of_parts.values()))}
    by_position = [mean(losses) for losses in zip(*columns.pop("loss_by_position"), strict=True)]
    means = {name: sum(values) if name in ("tokens", "bytes") else mean(values) for name, values in columns.items()}
    parts = {name: {key: value for key, value in results.items() if key != "loss_by_position"} for name, results in of_parts.items()}
    return means | {"loss_by_position": by_position, "parts": parts}


class _Stopped(Exception):
    """An evaluation is not gone on with."""


def source_text(source: TokenSource, tokens: int) -> bytes:
    """The UTF-8 text of the first ``tokens`` tokens, without the ends of documents."""
    ids = source.read(0, tokens)
    if isinstance(source.tokenizer, ByteTokenizer):  # whatever the bytes are, valid text or not
        return ids[ids < source.tokenizer.document_end].astype(np.uint8).tobytes()
    # A document at a time: a tokenizer may set a space before a text, which decoding takes from the first alone.
    ends = source.documents[source.documents < tokens]
    return b"".join(source.tokenizer.decode(of_document).encode() for of_document in np.split(ids, ends))


def _recall_tasks(config: RunConfig, vocabulary: int) -> list[mqar.Task]:
    """The recall problems to evaluate on: of the kinds that are trained on. Raises DataError where they do not fit."""
    if not config.data.mqar.share:
        return []
    tasks = mqar.tasks(config.data.mqar)
    for task in tasks:
        task.check(config.data.window, vocabulary)
    return tasks
