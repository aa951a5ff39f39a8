"""A process with an environment of its own: for compilers that read their options once, when they are loaded."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

_ENVIRONMENT = threading.Lock()  # of this process, in which another one is given its own


class Process:
    """Runs functions one after the other; started anew where the last one took it down with it."""

    def __init__(self, name: str, environment: dict[str, str]):
        self._name, self._environment = name, environment
        self._start()

    def _start(self):
        with _ENVIRONMENT, mock.patch.dict(os.environ, self._environment):  # what a process finds when it is spawned,
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            self._pool.submit(os.getpid)  # which is now

    def call(self, function: Callable[..., dict], *arguments) -> dict:
        """``function(*arguments)`` in that process. Raises RuntimeError where it dies."""
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._start()
            raise RuntimeError(f"{self._name} ended its process") from None

    def close(self):
        self._pool.shutdown()


class Here:
    """As :class:`Process`, in this one."""

    def call(self, function: Callable[..., dict], *arguments) -> dict:
        return function(*arguments)
