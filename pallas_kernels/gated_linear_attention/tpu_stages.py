"""Work of several heads interleaved, so that some heads compute while others wait for the matrix unit.

The TPU compiler schedules a kernel close to the order it is written in. So what is done for a head is a generator that yields
between stages, short ones, and its result what it returns.
"""

from collections.abc import Generator, Iterable


def together(work: Iterable[Generator]) -> Generator[None, None, list]:
    """A generator that runs others a stage each in turn, and returns what they return."""
    work = list(work)
    results, running = [None] * len(work), set(range(len(work)))
    while running:
        for n in sorted(running):
            try:
                next(work[n])
            except StopIteration as end:
                results[n] = end.value
                running.remove(n)
        if running:
            yield
    return results


def run(work: Iterable[Generator]) -> list:
    """Run generators to their ends, a stage each in turn, and return what they return."""
    stages = together(work)
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return end.value
