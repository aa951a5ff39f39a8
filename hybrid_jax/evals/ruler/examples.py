"""What the tasks share: an example, and the search for how much hay (sentences, words, documents) makes a prompt of a given length.

The search draws from the task's random numbers as it goes, so its steps, its order and what it measures are those of
lm-evaluation-harness: with any other, all later draws would differ.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hybrid_jax.data import DataError
from hybrid_jax.data.tokenizers import Tokenizer

TRIES = 100  # with the fewest units; the harness tries for ever


class Example(NamedTuple):
    """A prompt, and what has to be in the text that follows it."""

    prompt: str
    answers: list[str]
    tokens: int  # of the prompt as the task measures it, and the tokens to be written


@dataclass(frozen=True)
class Request:
    """What is asked of a task.

    Attributes:
        task: its name, for messages.
        tokenizer: what lengths are measured with.
        length: tokens that a prompt and what is written after it take, at most.
        examples: how many.
        seed: of the draws.
        new_tokens: tokens to be written.
    """

    task: str
    tokenizer: Tokenizer
    length: int
    examples: int
    seed: int
    new_tokens: int

    def count(self, text: str) -> int:
        """The tokens of ``text``."""
        return len(self.tokenizer.encode(text))

    def too_short(self, needed: int) -> DataError:
        """What to raise where the length has no room for any example; ``needed``: tokens that the shortest takes."""
        needed = max(needed, self.length + 1)  # what is drawn to tell it may be shorter than what did not fit
        return DataError(
            f"{self.task} at length {self.length} has no room for any example: the shortest takes about {needed} tokens of "
            f"{self.tokenizer.name!r}: give a longer length, or leave the task out"
        )


def most_units(measure: Callable[[int], int], room: int, step: int, *, most: int | None = None, tried: int | None = None) -> int:
    """How many units of hay fit ``room`` tokens, in steps: the last that ``measure`` (units -> tokens) found to fit; 0: not one step does.

    most: units there are, given where ``tried`` units (``most`` itself, if left open) would be passed without filling the room.
    """
    if room <= 0:
        return 0
    units, tokens, tried = step, 0, most if tried is None else tried
    while tokens < room:
        tokens = measure(units)
        if tokens > room:
            return units - step
        if tried is not None and units + step > tried:
            return most
        units += step
    return units  # the room is filled to the last token; one step more is what the harness goes on with, and finds too long


def downwards(units: int, step: int) -> Iterator[int]:
    """Fewer and fewer units, and at last the fewest again and again: where all are too long, another draw may be shorter."""
    tries = range(units, 0, -step)
    return itertools.chain(tries, itertools.repeat(tries[-1], TRIES))


def fitting_examples(
    request: Request, draw: Callable[[int, int], Example | None], tries: Callable[[int], Iterable[int]]
) -> Iterator[Example]:
    """For each index the first of ``draw(index, units)``, units as in ``tries(index)``, that fits; one that never fits is left out.

    draw: gives None where what it drew is of no use. Raises `DataError` where nothing fits.
    """
    found, too_long = 0, []
    for index in range(request.examples):
        for units in tries(index):
            example = draw(index, units)
            if example is None:
                continue
            if example.tokens <= request.length:
                found += 1
                yield example
                break
            too_long.append(example.tokens)
    if not found:
        raise request.too_short(min(too_long, default=0))
