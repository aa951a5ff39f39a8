"""Commands of ours, one after the other, each in a process of its own, which gets the signals that come to this one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

NOTICE = "what is running saves and stops; a second signal stops it at once"


class Children:
    """While entered, SIGTERM, Ctrl-C and the end of the terminal do not end this process but are passed on, as SIGTERM, to its child.

    A trainer saves then and stops (hybrid_jax/train/signals.py), which takes longer than Python would wait for it.

    environment: of the children, where this process's own does not say otherwise.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, environment: dict[str, str] | None = None):
        self._environment = environment or {}
        self.stopped: str | None = None  # the signal that came; nothing is started any more then
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> "Children":
        heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        self._before = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _) -> None:
        self.stopped = signal.Signals(number).name
        if self._child:
            self._child.terminate()
        os.write(2, f"\n{self.stopped}: {NOTICE}\n".encode())  # straight to stderr: what it interrupts may be a print

    def run(self, command: str, *arguments: str, log: Path) -> bool:
        """Whether ``python -m experiments.COMMAND`` ended with exit code 0; what it prints is added to ``log``."""
        if self.stopped:
            return False
        argv = [sys.executable, "-m", f"experiments.{command}", *arguments]
        options = {"stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "start_new_session": True}  # a Ctrl-C reaches it once
        options["env"] = self._environment | os.environ
        with log.open("a") as out, subprocess.Popen(argv, stdout=out, **options) as self._child:
            if self.stopped:  # while it was being started
                self._child.terminate()
            code = self._child.wait()
        self._child = None
        return code == 0
