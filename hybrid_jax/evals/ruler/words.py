"""Aggregation: the most common words of a numbered list (CWE), the most frequent coded words of a text (FWE)."""

import random
import string
from collections.abc import Iterator

import numpy as np

from hybrid_jax.evals.ruler.examples import Example, Request, downwards, fitting_examples, most_units
from hybrid_jax.evals.ruler.wordlists import english_words

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
    "{context}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_ANSWER = "Answer: The top 10 words that appear most often in the list are:"
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
    "{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
ORDER = 42  # of shuffles that no seed changes
STEP = 10  # words that a list grows by, and the common ones among them
CODE_LETTERS = 6
ZIPF = 2.0  # coded word number k is there k^-2 times as often as the first
ZETA = np.pi**2 / 6  # the sum over all k


def common_words(request: Request) -> Iterator[Example]:
    """CWE, of about the length: ten words that are there often, and as many others as fit that are there seldom."""
    rng, order = random.Random(request.seed), random.Random(ORDER)
    vocabulary = sorted({*english_words("noun"), *english_words("adjective"), *english_words("verb")})
    order.shuffle(vocabulary)
    short = request.length < 4096
    shot_words, shot_often, shot_seldom, often, seldom = (20, 3, 1, 6, 1) if short else (40, 10, 3, 30, 3)

    def numbered(words: list[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))

    def one(words: int, often: int, seldom: int) -> tuple[str, list[str]]:
        chosen = rng.sample(vocabulary, words)
        repeated = chosen[:STEP] * often + chosen[STEP:] * seldom
        order.shuffle(repeated)
        return COMMON.format(context=numbered(repeated)), chosen[:STEP]

    def pair(words: int):  # a solved example too: it is measured, not given
        return *one(shot_words, shot_often, shot_seldom), *one(words, often, seldom)

    def measure(words: int) -> int:
        shot, shot_answers, text, answers = pair(words)
        solved = f"{shot} {COMMON_ANSWER}{numbered(shot_answers)}\n{text} {COMMON_ANSWER} {numbered(answers)}"
        return request.count(solved)

    def draw(_: int, words: int) -> Example:
        *_, text, answers = pair(words)
        return Example(f"{text}\n\n{COMMON_ANSWER}", answers, request.count(f"{text} {COMMON_ANSWER}") + request.new_tokens)

    words = most_units(measure, request.length - request.new_tokens, STEP, most=len(vocabulary))
    if not words:
        raise request.too_short(request.new_tokens + measure(STEP))
    yield from fitting_examples(request, draw, lambda _: downwards(words, STEP))


def frequent_words(request: Request) -> Iterator[Example]:
    """FWE: the prompt alone fills the length, as in the harness; coded words are six random letters, the most frequent one dots."""
    rng, step, size = random.Random(request.seed), request.length // 32, request.length // 50

    def words_of(number: int) -> list[int]:  # how often each of the vocabulary is there
        return (number * np.arange(1, size + 1) ** -ZIPF / ZETA).astype(int).tolist()

    def text(vocabulary: list[str], number: int) -> str:
        words = [word for word, count in zip(vocabulary, words_of(number), strict=True) for _ in range(count)]
        random.Random(ORDER).shuffle(words)
        return FREQUENT.format(context=" ".join(words))

    def draw_vocabulary() -> list[str]:
        vocabulary = set()
        while len(vocabulary) < size:
            vocabulary.add("".join(rng.choices(string.ascii_lowercase, k=CODE_LETTERS)))
        vocabulary = sorted(vocabulary)
        random.Random(ORDER).shuffle(vocabulary)
        return ["...", *vocabulary[1:]]

    def check(number: int) -> None:
        counts = [*words_of(max(number, 0)), 0, 0, 0, 0, 0]
        if counts[3] <= counts[4]:  # the third word after the dots is not to be told from the fourth
            raise request.too_short(max(6 * 53, request.count(text(vocabulary, 60)) + step))

    vocabulary, most = draw_vocabulary(), request.length // CODE_LETTERS
    check(most)
    while request.count(text(vocabulary, most)) < request.length:
        most += step
    most -= step
    for _ in range(request.examples):
        vocabulary, number = draw_vocabulary(), most
        check(number)
        while (tokens := request.count(prompt := text(vocabulary, number))) > request.length:
            number -= step
            check(number)
        yield Example(prompt, vocabulary[1:4], tokens + request.new_tokens)
