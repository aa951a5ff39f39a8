"""What a run writes down as it goes: JSON lines, TensorBoard and, when asked for, Weights & Biases."""

import json
import math
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from hybrid_jax.config import RunConfig, to_dict
from hybrid_jax.storage import in_bucket, one_line, write_whole
from hybrid_jax.train.workdir import RunError

COPIED_EVERY = 60.0  # seconds, to a bucket

Sink = Callable[[int, dict[str, Any]], None]


class Metrics:
    """Rows of numbers by step, to every place the run is watched from. Rows may nest: {"evaluation": {"loss": 1.2}}.

    A bucket's files cannot grow: there the files grow in a temporary folder and are copied whole, every minute and by :meth:`flush`.
    """

    def __init__(self, workdir: epath.Path, config: RunConfig, name: str, start_step: int = 0):
        """Goes on after ``start_step``: rows of steps after it, written by a run that was then killed, are dropped."""
        self._workdir, self._copied, self._more = workdir, time.monotonic(), True
        self._temporary = tempfile.TemporaryDirectory(prefix="metrics-") if in_bucket(workdir) else None
        self._folder = epath.Path(self._temporary.name) if self._temporary else workdir  # where the files grow
        self._growing: list[str] = []
        self._closers: list[Callable[[], None]] = []
        self._sinks: list[Sink] = [self._json_lines("metrics.jsonl", start_step)]
        if config.log.tensorboard:
            self._sinks.append(self._tensorboard(f"tensorboard/events.out.tfevents.{time.time_ns()}", start_step))
        if config.log.wandb_project is not None:
            self._sinks.append(self._wandb(config, name))

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Write the row of ``step``; numbers that are not finite are written as None, which JSON has. Warns where a bucket takes none."""
        row = _finite(row)
        for sink in self._sinks:
            sink(step, row)
        self._more = True
        if time.monotonic() - self._copied > COPIED_EVERY:
            try:
                self.flush()
            except RunError as error:  # no reason to stop training: there is time until the next checkpoint
                warnings.warn(f"metrics wait to be written to {self._workdir} ({one_line(error.__cause__)})", stacklevel=2)
                self._copied = time.monotonic()

    def flush(self) -> None:
        """Return when all rows are in the workdir. Raises RunError where a bucket does not take them."""
        if self._temporary and self._more:
            try:
                for name in self._growing:
                    (self._workdir / name).write_bytes((self._folder / name).read_bytes())
            except Exception as error:  # Cloud Storage, the network and Google's credentials each have their own
                raise RunError(
                    f"the metrics could not be written to {self._workdir} ({one_line(error)}): "
                    "the same command goes on from the last checkpoint"
                ) from error
            self._copied, self._more = time.monotonic(), False

    def close(self) -> None:
        for close in self._closers:
            close()
        try:
            self.flush()
        finally:
            if self._temporary:
                self._temporary.cleanup()

    def _json_lines(self, name: str, start_step: int) -> Sink:
        kept = [json.dumps(row) + "\n" for row in read_rows(self._workdir / name) if row["step"] <= start_step]
        new = self._folder / "metrics.tmp"
        new.write_text("".join(kept))
        new.replace(self._folder / name)
        out = (self._folder / name).open("a")
        self._growing.append(name)
        self._closers.append(out.close)
        # Each line at once: whoever follows the file sees whole ones.
        return lambda step, row: print(json.dumps({"step": step, "time": round(time.time(), 3), **row}), file=out, flush=True)

    def _tensorboard(self, name: str, start_step: int) -> Sink:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        # Records rather than tensorboardX's SummaryWriter, whose thread and exit hook end in tracebacks on a full disk.
        (self._folder / name).parent.mkdir(exist_ok=True)
        records = RecordWriter(str(self._folder / name))
        self._growing.append(name)
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

    def _wandb(self, config: RunConfig, name: str) -> Sink:
        import wandb

        file = self._workdir / "wandb_id"  # so that a run that continues is the same one there, and no other is
        if not file.exists():
            write_whole(file, secrets.token_hex(8) + "\n")
        options = {"project": config.log.wandb_project, "name": name, "config": to_dict(config)}
        run = wandb.init(**options, id=file.read_text().strip(), resume="allow", dir=str(self._folder))
        self._closers.append(run.finish)
        return lambda step, row: run.log(dict(_scalars(row)), step=step)


def read_rows(file: epath.Path) -> list[dict[str, Any]]:
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
