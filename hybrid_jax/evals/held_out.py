"""Held-out text in windows of several lengths, out to many times what the model was trained on.

The same tokens are scored at each length, so that what differs is how much of the text precedes them. A window is read by chunks
with a cache, as a prompt is: its memory is that of the cache and of one chunk.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from hybrid_jax.cache import Cache
from hybrid_jax.data import DataError
from hybrid_jax.data.token_source import TokenSource
from hybrid_jax.evals.evaluate import source_text
from hybrid_jax.evals.processes import on_local_devices, rows_at_once, shared, watched
from hybrid_jax.figure import REFERENCE, subplots
from hybrid_jax.generation import CHUNK, ring_slots
from hybrid_jax.loss import token_losses
from hybrid_jax.model import Model
from hybrid_jax.train.metrics import by_doubling

SHOWN = 256  # tokens, at least, that a point of the picture is the mean of


def evaluate(model: Model, source: TokenSource, lengths: Sequence[int], *, tokens: int = 1_000_000, batch: int = 8) -> dict[str, Any]:
    """The losses of ``model`` on the first ``tokens`` tokens of ``source``, cut into windows of each of ``lengths``.

    As many tokens are scored as windows of the greatest length hold. What the first of a window is predicted from is the token
    before it; documents are not told apart, as in windows of training text. ``batch`` windows are read at one time by each device; in
    a run of several processes each reads its share, and all return all results.

    Returns, ready for JSON, {"settings", "scores"}: for each length
        loss                nats a token
        perplexity          e to that
        bits_per_byte       of the text (the ends of documents are paid for, and are no bytes)
        loss_by_position    means over positions 0, 1, 2-3, 4-7, ... of a window

    Raises DataError where a length is out of range, or the source's tokens are not the model's.
    """
    lengths = sorted(set(lengths))
    scored = min(tokens, len(source))
    if not lengths or lengths[0] < 2 or lengths[-1] > scored:
        raise DataError(
            f"lengths {', '.join(map(str, lengths))}: give at least one, from 2 to {scored}, the tokens of {source.name} to score"
        )
    source.check_vocabulary(model.config.vocabulary)
    scored -= scored % lengths[-1]
    text_bytes = len(source_text(source, scored))
    stream = np.concatenate([[source.tokenizer.document_end], source.read(0, scored)]).astype(np.int32)
    scores = {}
    for length in lengths:
        windows = [(start, min(start + length, scored)) for start in range(0, scored, length)]
        losses = shared(partial(_window_losses, model, stream, length, batch), windows, size=lambda window: window[1] - window[0])
        totals, weights = np.zeros(length), np.zeros(length)
        for of_window in losses:
            totals[: len(of_window)] += of_window
            weights[: len(of_window)] += 1
        loss = float(totals.sum() / scored)
        scores[str(length)] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": float(totals.sum() / math.log(2) / text_bytes),
            "loss_by_position": by_doubling(totals, weights),
        }
    return {"settings": {"source": source.name, "lengths": lengths, "tokens": scored, "bytes": text_bytes}, "scores": scores}


def _window_losses(model: Model, stream: np.ndarray, length: int, batch: int, windows: list[tuple[int, int]]) -> list[list[float]]:
    """The losses of each window's tokens; (start, stop) are places in the text, one less than in ``stream``."""
    mesh, model = on_local_devices(model)
    graph, params = nnx.split(model)
    rows, chunk = rows_at_once(mesh, batch, len(windows)), min(CHUNK, length)
    found = []
    for first in watched(range(0, len(windows), rows), f"windows of {length:,}"):
        of_batch = windows[first : first + rows]
        tokens, targets = np.zeros((2, rows, -(-length // chunk) * chunk), np.int32)
        real = np.zeros(tokens.shape, bool)
        for row, (start, stop) in enumerate(of_batch):
            width = stop - start
            tokens[row, :width], targets[row, :width], real[row, :width] = stream[start:stop], stream[start + 1 : stop + 1], True
        losses = []
        with jax.set_mesh(mesh):
            cache = model.empty_cache(rows, ring_slots(model, tokens.shape[1]))
            for begin in range(0, tokens.shape[1], chunk):
                part = np.s_[:, begin : begin + chunk]
                of_chunk, cache = _read(graph, params, tokens[part], targets[part], real[part], cache)
                losses.append(of_chunk)
        losses = np.concatenate(jax.device_get(losses), axis=1)
        found += [losses[row, : stop - start].tolist() for row, (start, stop) in enumerate(of_batch)]
    return found


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _read(graph: nnx.GraphDef, params: nnx.State, tokens, targets, real, cache: Cache) -> tuple[jax.Array, Cache]:
    """(the loss of each token [B,T], the cache with the tokens in it)."""
    model = nnx.merge(graph, params)
    hidden, cache = model.extend(tokens, real, cache)
    return token_losses(hidden, model.output_kernel(), targets)[0], cache


def plot(results: dict[str, Any], file: epath.Path, *, trained: int | None = None) -> None:
    """Draw what :func:`evaluate` returned: the loss by position, a line a length. trained: the length of the training windows."""
    from matplotlib import colormaps

    with subplots(file, size=(7, 4.2)) as (_, axes):
        shades = colormaps["viridis_r"](np.linspace(0.15, 0.9, len(results["scores"])))
        for (length, scores), color in zip(results["scores"].items(), shades, strict=True):
            windows, places, means = results["settings"]["tokens"] / int(length), [], []
            for name, loss in scores["loss_by_position"].items():
                first, last = (int(name.split("-")[i]) + 1 for i in (0, -1))
                if windows * (last + 1 - first) >= SHOWN:
                    places.append(math.sqrt(first * last))
                    means.append(loss)
            label = f"{int(length):,} tokens: {scores['loss']:.3f} in all"
            axes.plot(places, means, "o-", markersize=4, linewidth=1.8, color=color, label=label)
        if trained:
            axes.axvline(trained, color=REFERENCE, linestyle="--", linewidth=1)
            axes.annotate("  trained on", (trained, 0.98), xycoords=("data", "axes fraction"), va="top", color=REFERENCE)
        axes.set(title="Held-out loss by position, in windows of several lengths", xlabel="position", ylabel="nats a token")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(title="windows of")
