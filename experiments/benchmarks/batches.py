"""Seconds a call of work that a device does on its own time, measured alike whatever library drives it."""

import time
from collections.abc import Callable

import numpy as np

SECONDS = 0.4  # about how long calls are repeated for, after the first
BATCH = 0.02  # seconds of a batch of calls at least, so that starting and awaiting it do not count
STEP_SECONDS = 4.0  # and steps of training, long enough for the card to get as warm as it would
LEAST = 3  # batches


def batches(call: Callable[[], object], wait: Callable[[object], object], seconds: float | None = None) -> list[float]:
    """Seconds a call, of each batch: calls are made one after the other and only the last one's result is awaited.

    They are repeated for about ``seconds``, by default :data:`SECONDS`. The first call, which may compile, and the next, which says how
    long one takes, are left out.
    """
    wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    calls = max(1, round(BATCH / once))
    until = SECONDS if seconds is None else seconds
    times: list[float] = []
    while len(times) < LEAST or sum(times) * calls < until:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        times.append((time.perf_counter() - start) / calls)
    return times


def summary(seconds: list[float]) -> dict:
    """Of a row: what was timed several times, as :func:`batches` gives it, by its median and quartiles."""
    lower, median, upper = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {"median_s": median, "quartiles_s": [lower, upper], "repetitions": len(seconds)}
