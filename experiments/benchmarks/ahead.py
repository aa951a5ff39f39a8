"""Compilation ahead of measurement, in as many processes as there are cores: when a case's turn comes its programs are on disk."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from experiments.compiled.process import Process


def keep_programs() -> dict[str, str]:
    """Have JAX keep on disk all that it compiles, here and in processes with the environment that this returns."""
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_jax" / "programs")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def rehearse(perform: Callable, tasks: list, environment: dict[str, str], until: float) -> None:
    """``perform(task)`` for every task, in processes with ``environment``; none is begun in the second half of the time until ``until``, by
    ``time.monotonic``, and none goes on after it.

    What one gives is dropped, and what it raises too: its own turn will tell.
    """
    begun_until = (time.monotonic() + until) / 2
    workers = min(len(tasks), os.cpu_count())
    if workers < 2:
        return
    print(f"compiled ahead, in {workers} processes")
    own = threading.local()
    started = []

    def start():
        own.process = Process("a compiler", environment)
        started.append(own.process)

    def run(task):
        if (now := time.monotonic()) < begun_until:
            with contextlib.suppress(Exception):
                own.process.call(perform, task, seconds=until - now)

    with ThreadPoolExecutor(workers, initializer=start) as threads:
        list(threads.map(run, tasks))
    for process in started:
        process.close()
