"""What a run writes down as it goes: JSON lines, TensorBoard and, when asked for, Weights & Biases."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_jax.config import LogConfig

Sink = Callable[[int, dict[str, Any]], None]


class Metrics:
    """Rows of numbers by step, to every place the run is watched from. Rows may nest: {"evaluation": {"loss": 1.2}}."""

    def __init__(self, workdir: Path, config: LogConfig, name: str, start_step: int = 0):
        """Goes on after ``start_step``: rows of steps after it, written by a run that was then killed, are dropped."""
        self._closers: list[Callable[[], None]] = []
        self._sinks: list[Sink] = [self._json_lines(workdir / "metrics.jsonl", start_step)]
        if config.tensorboard:
            self._sinks.append(self._tensorboard(workdir / "tensorboard", start_step))
        if config.wandb_project is not None:
            self._sinks.append(self._wandb(workdir, config.wandb_project, name))

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Write the row of ``step``; numbers that are not finite are written as None, which JSON has."""
        row = _finite(row)
        for sink in self._sinks:
            sink(step, row)

    def close(self) -> None:
        for close in self._closers:
            close()

    def _json_lines(self, file: Path, start_step: int) -> Sink:
        if file.exists():
            kept = [json.dumps(row) + "\n" for row in read_rows(file) if row["step"] <= start_step]
            new = file.with_suffix(".tmp")
            new.write_text("".join(kept))
            new.replace(file)
        out = file.open("a", buffering=1)  # by lines: whoever follows the file sees whole ones
        self._closers.append(out.close)
        return lambda step, row: print(json.dumps({"step": step, **row}), file=out)

    def _tensorboard(self, folder: Path, start_step: int) -> Sink:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        # Records rather than tensorboardX's SummaryWriter, whose thread and exit hook end in tracebacks on a full disk.
        folder.mkdir(exist_ok=True)
        records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        self._closers.append(records.close)

        def add(**event) -> None:
            records.write(Event(wall_time=time.time(), **event).SerializeToString())
            records.flush()

        def write(step: int, row: dict[str, Any]) -> None:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in _scalars(row)]
            add(step=step, summary=Summary(value=values))

        add(file_version="brain.Event:2")
        add(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))  # drops what older files have from here on
        return write

    def _wandb(self, workdir: Path, project: str, name: str) -> Sink:
        import wandb

        identity = str(workdir.resolve()).strip("/").replace("/", "-")  # so that a run that continues is the same one there
        run = wandb.init(project=project, name=name, id=identity, resume="allow", dir=str(workdir))
        self._closers.append(run.finish)
        return lambda step, row: run.log(dict(_scalars(row)), step=step)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, none where there is none yet; a last line cut short by a kill is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value


def by_doubling(totals: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Means over positions 0, 1, 2-3, 4-7, ... of a window [T], from sums and weights; places without weight are left out."""
    means = {}
    first, width = 0, 1
    while first < len(totals):
        last = min(first + width, len(totals)) - 1
        weight = weights[first : last + 1].sum()
        if weight > 0:
            means[f"{first}-{last}" if last > first else str(first)] = float(totals[first : last + 1].sum() / weight)
        width = max(1, last + 1)
        first = last + 1
    return means
