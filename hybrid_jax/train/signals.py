"""Stopping when asked: SIGTERM (a scheduler, a preempted machine) and SIGINT (Ctrl-C)."""

import os
import signal

import jax
from jax.experimental import multihost_utils


class Stop:
    """While entered, the first signal is only noted, to be acted on between two steps; a second one ends the process at once.

    Where several processes train together, JAX's own preemption service watches for SIGTERM instead, so that all of them
    stop at the same step; Ctrl-C in one of them is taken for that, so that all end with its exit code, and a second one ends it at once.

    notice: what is said on stderr when a signal comes, as the step under way may take a while.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, notice: str | None = None):
        self.name: str | None = None
        self._notice = notice
        self._times = 0  # asked

    def __enter__(self) -> "Stop":
        if jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        else:
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._tell_all)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.name = signal.Signals(number).name
        for other in self.SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        self._say(self.name)

    def _tell_all(self, number: int, _) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        self._say(signal.Signals(number).name)

    def _say(self, name: str) -> None:
        if self._notice:  # straight to stderr: what it interrupts may be a print
            os.write(2, f"\n{name}: {self._notice}\n".encode())

    @property
    def exit_code(self) -> int:
        """What a process that a signal ends has by convention: done is only what was not stopped."""
        return 128 + signal.Signals[self.name]

    def asked(self) -> bool:
        """Whether to stop here; of several processes all ask at the same places, and all are told the same."""
        self._times += 1
        if jax.process_count() > 1 and self.name is None and multihost_utils.reached_preemption_sync_point(self._times):
            self.name = "SIGTERM"
        return self.name is not None
