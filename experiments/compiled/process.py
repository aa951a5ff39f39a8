"""A process with an environment of its own: for compilers that read their options once, and for what may hang, or take a card with it."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from unittest import mock

SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # for JAX to leave a card's memory to others; read when it first asks for the card
_ENVIRONMENT = threading.Lock()  # of this process, in which another one is given its own


class Process:
    """Runs functions one after the other. It is started when it is first called, and anew where it was lost or stopped."""

    def __init__(self, name: str, environment: dict[str, str]):
        self._name, self._environment = name, environment
        self._process = None

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end,), daemon=True)
        with _ENVIRONMENT, mock.patch.dict(os.environ, self._environment):  # what a process finds when it is spawned
            self._process.start()
        end.close()

    def call(self, function: Callable[..., dict], *arguments, seconds: float | None = None) -> dict:
        """``function(*arguments)`` in that process.

        Raises what it raises, and RuntimeError where the process dies, or gives no answer within ``seconds``, which ends it.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(seconds):
                self.close()
                raise RuntimeError(f"{self._name} gave no answer within {seconds:.0f} s, and was ended")
            answer, error = self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            raise RuntimeError(f"{self._name} ended its process") from None
        if error is not None:
            raise error
        return answer

    def close(self):
        """End it, whatever it is doing, with what it holds of a card's memory; another call starts it anew."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the process that asks ends this one
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # nobody asks any more
            return
        try:
            pipe.send((function(*arguments), None))
        except Exception as error:
            pipe.send((None, _portable(error)))


def _portable(error: Exception) -> Exception:
    """The error, or a RuntimeError that says the same where another process could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class Here:
    """As :class:`Process`, in this one."""

    def call(self, function: Callable[..., dict], *arguments, seconds: float | None = None) -> dict:
        return function(*arguments)

    def close(self):
        pass
