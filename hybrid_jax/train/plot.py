"""One picture of a run: how the loss fell, what the evaluations say, where in the window, and recall."""

import json

import numpy as np
from etils import epath

from hybrid_jax.amounts import count
from hybrid_jax.figure import REFERENCE, subplots
from hybrid_jax.train.metrics import read_rows
from hybrid_jax.train.workdir import read_evaluations

TRAINING, HELD_OUT, RECALL = "#4C78A8", "#E45756", "#54A24B"
ABOVE = 1.15  # of the largest value: how high an axis goes, with room for a label


def plot_run(workdir: epath.Path, name: str | None = None) -> epath.Path:
    """Draw WORKDIR/summary.png from its metrics.jsonl and eval-*.json, for a run that ended or is under way.

    name: of its model; where it is not given, as summary.json has it.
    """
    rows = read_rows(workdir / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "evaluation" in row]
    full = list(read_evaluations(workdir).values())
    file = workdir / "summary.png"
    with subplots(file, 2, 2, size=(11, 7.5)) as (figure, axes):
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
        _losses(axes[0, 0], training, evaluations)
        _bits(axes[0, 1], evaluations)
        _positions(axes[1, 0], full)
        _recall(axes[1, 1], evaluations)
        figure.suptitle(_title(workdir, rows, name), x=0.01, ha="left", fontsize=13, fontweight="bold")
    return file


def _title(workdir: epath.Path, rows: list[dict], name: str | None) -> str:
    last, folder, summary = max((row["step"] for row in rows), default=0), workdir.resolve().name, workdir / "summary.json"
    if name is None and summary.exists():
        name = json.loads(summary.read_text())["run"]
    return f"{folder if name in (None, folder) else f'{name} ({folder})'}, {count(last, 'step')}"


def _losses(axes, training: list[dict], evaluations: list[dict]) -> None:
    steps = np.array([row["step"] for row in training])
    # A skipped step's loss is not finite: a gap in the curve.
    losses = np.array([np.nan if row["loss"] is None else row["loss"] for row in training], np.float64)
    axes.plot(steps, losses, color=TRAINING, alpha=0.3, linewidth=1)
    marker = "o" if len(steps) == 1 else None  # a line has two ends
    axes.plot(steps, smoothed(losses), color=TRAINING, marker=marker, markersize=4, linewidth=1.8, label="training batches")
    if evaluations:
        held_out = [row["evaluation"]["loss"] for row in evaluations]
        axes.plot([row["step"] for row in evaluations], held_out, "o-", color=HELD_OUT, markersize=4, linewidth=1.2, label="held-out text")
    axes.set(title="Loss", ylabel="nats a token")
    _along_steps(axes)
    if len(steps) and steps[-1] >= 30:  # most of the fall is in the first steps
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(left=max(1, steps[0]))
    else:
        axes.set_xlim(left=0)
    axes.legend()


def _along_steps(axes) -> None:
    """An axis of whole steps."""
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Each value's mean with those before it, over the last tenth of the way there; gaps are left out."""
    means = np.full(len(values), np.nan)
    for i in range(len(values)):
        seen = values[i - min(i, (i + 1) // 10) : i + 1]
        if np.isfinite(seen).any():
            means[i] = np.nanmean(seen)
    return means


def _bits(axes, evaluations: list[dict]) -> None:
    axes.set(title="Held-out bits per byte", ylabel="bits per byte")
    _along_steps(axes)
    if not evaluations:
        return _empty(axes, "no evaluation yet")
    steps = [row["step"] for row in evaluations]
    bits = [row["evaluation"]["bits_per_byte"] for row in evaluations]
    axes.plot(steps, bits, "o-", color=HELD_OUT, markersize=5, linewidth=1.8)
    _annotate_last(axes, steps[-1], bits[-1], f"{bits[-1]:.3f}", HELD_OUT)
    last = evaluations[-1]["evaluation"]
    for name, key in (("unigram", "unigram_bits_per_byte"), ("xz -9", "xz_bits_per_byte")):
        axes.axhline(last[key], color=REFERENCE, linestyle="--", linewidth=1)
        axes.annotate(f"{name}  {last[key]:.3f}", (0.01, last[key]), xycoords=("axes fraction", "data"), va="bottom", color=REFERENCE)
    axes.set_ylim(bottom=0, top=ABOVE * max(*bits, last["unigram_bits_per_byte"]))
    axes.set_xlim(left=0)


def _positions(axes, full: list[dict]) -> None:
    axes.set(title="Held-out loss by position in the window", xlabel="position", ylabel="nats a token")
    if not full:
        return _empty(axes, "no evaluation yet")
    shown = full if len(full) <= 4 else [full[round(i * (len(full) - 1) / 3)] for i in range(4)]
    for i, evaluation in enumerate(shown):
        losses = np.array([np.nan if x is None else x for x in evaluation["loss_by_position"]], np.float64)
        places, means = by_log_bins(losses)
        newest = i == len(shown) - 1
        axes.plot(
            places,
            means,
            color=HELD_OUT,
            alpha=1 if newest else 0.25 + 0.15 * i,
            linewidth=1.8 if newest else 1.2,
            label=f"step {evaluation['step']:,}",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()


def by_log_bins(losses: np.ndarray, per_doubling: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Losses [T] averaged in bins of equal width on a log scale: (positions from 1, means)."""
    positions = np.arange(1, len(losses) + 1)
    bins = np.floor(per_doubling * np.log2(positions)).astype(int)
    groups = [np.flatnonzero(bins == b) for b in np.unique(bins)]
    groups = [group for group in groups if np.isfinite(losses[group]).any()]
    return np.array([positions[group].mean() for group in groups]), np.array([np.nanmean(losses[group]) for group in groups])


def _recall(axes, evaluations: list[dict]) -> None:
    axes.set(title="Associative recall (MQAR), held out", ylabel="answers right")
    _along_steps(axes)
    measured = [row for row in evaluations if "mqar_accuracy" in row["evaluation"]]
    if not measured:
        return _empty(axes, "not measured")
    steps = [row["step"] for row in measured]
    accuracy = [row["evaluation"]["mqar_accuracy"] for row in measured]
    axes.plot(steps, accuracy, "o-", color=RECALL, markersize=5, linewidth=1.8)
    _annotate_last(axes, steps[-1], accuracy[-1], f"{accuracy[-1]:.1%}", RECALL)
    axes.set_ylim(-0.03, ABOVE)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")


def _annotate_last(axes, x: float, y: float, text: str, color: str) -> None:
    place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "right"}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # so that no line goes through it
    axes.annotate(text, (x, y), **place, color=color, fontweight="bold", bbox=box)


def _empty(axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=REFERENCE)
    axes.set_xticks([])
    axes.set_yticks([])
