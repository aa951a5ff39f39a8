"""Needles in a haystack (NIAH): a text in which "magic" values are hidden, each under a key, and some keys that are asked for."""

import itertools
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hybrid_jax.evals.ruler.examples import Example, Request, fitting_examples, most_units
from hybrid_jax.evals.ruler.texts import Essays
from hybrid_jax.evals.ruler.wordlists import keys

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ONE = (
    "A special magic {one} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {one} afterwards.\n"
    "{context}\nWhat is the special magic {one} for {query} mentioned in the provided text? "
    "The special magic {one} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
    "{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are"
)
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int).tolist()  # percent of an essay's sentences
ORDER = 42  # of a prompt's needles: a shuffle that no seed changes


@dataclass(frozen=True)
class Needles:
    """What is hidden in what.

    Attributes:
        hay: "noise" (the same line again and again), "needles" (others of the kind), or "essays".
        key, value: "words", "numbers" (seven digits) or "uuids".
        keys: how many are hidden, beside those of the hay.
        values: how many each has.
        queries: how many keys are asked for.
    """

    hay: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def examples(self, request: Request, essays: Essays | None) -> Iterator[Example]:
        """Examples of about the length: a unit of hay is a line, or a word of the ``essays``."""
        rng = random.Random(request.seed)
        room, needles = request.length - request.new_tokens, self.keys * self.values
        step = 500 if self.hay == "essays" else 25 if request.length >= 4096 else 5
        ends = {"most": len(essays.words), "tried": len(essays.words) + step} if self.hay == "essays" else {}

        def measure(units: int) -> int:
            text, _, answers = self._draw(units, rng, essays)
            return request.count(text + " ".join(answers))

        def draw(_: int, units: int) -> Example:
            text, prompt, answers = self._draw(units, rng, essays)
            return Example(prompt, answers, request.count(text) + request.new_tokens)

        units = max(most_units(measure, room, step, **ends), needles)
        yield from fitting_examples(request, draw, lambda _: range(units, 0, -step))

    def _draw(self, units: int, rng: random.Random, essays: Essays | None) -> tuple[str, str, list[str]]:
        """(the text up to its question, the same and the start of the answer, the answers)"""
        names, values = [], []
        for _ in range(self.keys):
            names.append(_random_string(self.key, rng))
            values.append([_random_string(self.value, rng) for _ in range(self.values)])
        needles = [NEEDLE.format(kind=self.value, key=name, value=value) for name, own in zip(names, values, strict=True) for value in own]
        random.Random(ORDER).shuffle(needles)
        context = _in_essays(needles, essays.sentences(units), rng) if self.hay == "essays" else self._in_lines(needles, units, rng)
        asked = rng.sample(range(self.keys), self.queries)
        query = ", and ".join(filter(None, [", ".join(names[i] for i in asked[:-1]), names[asked[-1]]]))
        template = ONE if self.queries * self.values == 1 else SEVERAL
        prompt = template.format(one=self.value[:-1], kind=self.value, context=context, query=query)
        return prompt[: prompt.rindex("?") + 1], prompt, [value for i in asked for value in values[i]]

    def _in_lines(self, needles: list[str], units: int, rng: random.Random) -> str:
        lines = [NOISE] * units
        if self.hay == "needles":
            kinds = self.key, self.value
            draws = ([_random_string(kind, rng) for kind in kinds] for _ in range(units))
            lines = [NEEDLE.format(kind=self.value, key=key, value=value) for key, value in draws]
        places = sorted(rng.sample(range(units), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def _in_essays(needles: list[str], sentences: list[str], rng: random.Random) -> str:
    depths = rng.sample(DEPTHS, len(needles))
    places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
    hay = [" ".join(sentences[start:stop]) for start, stop in itertools.pairwise(places)]
    return " ".join([part for pair in zip(hay, needles, strict=False) for part in pair] + hay[-1:])


def _random_string(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return rng.choice(keys())
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
