"""Variable tracking (VT): a chain of assignments scattered over noise, and all variables that have its value asked for.

One solved example goes before, with variables that are different in every prompt.
"""

import itertools
import random
import string
from collections.abc import Iterator

import numpy as np

from hybrid_jax.evals.ruler.examples import Example, Request, downwards, fitting_examples, most_units

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
TEMPLATE = (  # "assgined" is RULER's
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {variables} variables are assgined the value {value}, "
    "they are: "
)
VARIABLES = 5  # in the chain
SHOT_LENGTH, SHOT_STEP, SHOT_LETTERS = 500, 5, 3  # tokens of the solved example, lines it grows by, letters of its variables
STEP, LETTERS = 10, 5


class Tracing:
    """The state of the two generators that the harness draws from, in the order of its calls."""

    def __init__(self, seed: int):
        self.rng, self.values = random.Random(seed), np.random.RandomState(seed)

    def examples(self, request: Request) -> Iterator[Example]:
        """Examples of about the length: a unit of hay is a line of noise."""
        shot = self._shot(request)
        taken = request.new_tokens + request.count(shot)
        units = most_units(self._measure(request, LETTERS), request.length - taken, STEP)
        if not units:
            raise request.too_short(taken + self._measure(request, LETTERS)(STEP))

        def draw(_: int, units: int) -> Example | None:
            drawn = self._draw(units, LETTERS)
            if drawn is None:
                return None
            text, answers = drawn
            tokens = taken + request.count(text)
            if tokens > request.length:
                return Example(text, answers, tokens)
            return Example((self._renamed(shot) + "\n\n" + text).rstrip(), answers, tokens)

        yield from fitting_examples(request, draw, lambda _: downwards(units, STEP))

    def _shot(self, request: Request) -> str:
        """A short example and its answer. Where a tokenizer (of bytes, say) finds no room for any, the shortest there is."""
        room = SHOT_LENGTH - request.new_tokens
        units = most_units(self._measure(request, SHOT_LETTERS), room, SHOT_STEP) or SHOT_STEP
        for lines in downwards(units, SHOT_STEP):
            if drawn := self._draw(lines, SHOT_LETTERS):
                text, answers = drawn
                if request.count(text) <= room:
                    break
        return f"{text} {' '.join(answers)}\n\n"

    def _measure(self, request: Request, letters: int):
        def measure(units: int) -> int:
            drawn = None
            while drawn is None:
                drawn = self._draw(units, letters)
            text, answers = drawn
            return request.count(f"{text} {answers}")

        return measure

    def _draw(self, units: int, letters: int) -> tuple[str, list[str]] | None:
        """(the text up to its answer, the variables); None, after the draws that the harness fails on, where two have one name."""
        names = [self._name(letters) for _ in range(VARIABLES)]
        while len(set(names)) < VARIABLES:
            names.append(self._name(letters))
        value = self.values.randint(10000, 99999)
        if len(names) > VARIABLES:
            self.values.randint(10000, 99999)
            return None
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names))]
        lines = [NOISE] * units
        if units <= VARIABLES:  # too few places to insert at: sentences, not lines
            lines = [part + "." if part.strip() else part for line in lines for part in line.split(".")]
        for i, place in enumerate(sorted(self.rng.sample(range(len(lines)), VARIABLES))):
            lines.insert(place + i, chain[i])
        context = " ".join(lines).replace(". \n", ".\n")
        return TEMPLATE.format(context=context, value=value, variables=VARIABLES), names

    def _renamed(self, shot: str) -> str:
        """The solved example with other variables: each example has its own."""
        for name in shot[shot.index("they are: ") + len("they are: ") :].split():
            shot = shot.replace(name, self._name(len(name)))
        return shot

    def _name(self, letters: int) -> str:
        return "".join(self.rng.choices(string.ascii_uppercase, k=letters))
