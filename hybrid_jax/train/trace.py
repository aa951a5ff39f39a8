"""Some of a run's steps as JAX's profiler sees them, for xprof or TensorBoard."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from hybrid_jax.storage import in_bucket


class Trace:
    """While entered, ``steps`` (first, last) are traced into WORKDIR/profile, by each process its own devices; of (), none.

    say: what is called with a line once they are.
    """

    def __init__(self, workdir: epath.Path, steps: tuple[int, ...], say: Callable[[str], None]):
        self._workdir, self._say = workdir, say
        self._first, self._last = steps or (1, 0)
        self._temporary: tempfile.TemporaryDirectory | None = None  # where the profiler writes what is meant for a bucket
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def step(self, step: int, train_step: Callable, state: Any, batches: Iterator[Any]) -> Any:
        """What ``train_step`` returns for ``state`` and the next batch; waited for where a trace begins or ends."""
        if not self._first <= step <= self._last:
            return train_step(state, next(batches))
        if not self._running:
            jax.block_until_ready(state)  # else the steps before it would be in it
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            results = train_step(state, next(batches))
        if step == self._last:
            jax.block_until_ready(results)
            self._stop()
            self._say(f"steps {self._first} to {self._last} are traced in {self._workdir / 'profile'}")
        return results

    def _start(self) -> None:
        if in_bucket(self._workdir):
            self._temporary = tempfile.TemporaryDirectory(prefix="profile-")
        jax.profiler.start_trace(self._temporary.name if self._temporary else str(self._workdir / "profile"))
        self._running = True

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        if self._temporary:
            written = Path(self._temporary.name)
            for file in written.rglob("*"):
                if file.is_file():
                    (self._workdir / "profile" / file.relative_to(written)).write_bytes(file.read_bytes())
            self._temporary.cleanup()
