"""Question answering (QA): a question about one or more of many documents."""

import random
from collections.abc import Iterator

from hybrid_jax.data import DataError
from hybrid_jax.evals.ruler.examples import Example, Request, fitting_examples, most_units
from hybrid_jax.evals.ruler.texts import Questions

INSTRUCTION = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
TEMPLATE = f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\nQuestion: {{query}}"
STEP = 10  # documents that a prompt grows by
ORDER = 42  # of a prompt's documents: a shuffle that no seed changes


def examples(request: Request, source: Questions) -> Iterator[Example]:
    """The first questions of ``source``, each with its documents, those related and, drawn for each, as many others as fit."""
    rng, (questions, documents, _) = random.Random(request.seed), source
    if request.examples > len(questions):
        raise DataError(f"{request.task}: {source.source} has {len(questions)} questions: ask for so many examples at most")

    def draw_text(index: int, number: int) -> str:
        query, _, own, related = questions[index]
        chosen = range(len(documents))
        if number < len(documents):
            missing = number - len(own)
            if missing > len(related):
                taken = {*own, *related}
                others = [i for i in range(len(documents)) if i not in taken]
                chosen = own + related + rng.sample(others, missing - len(related))
            else:
                chosen = own + rng.sample(related, max(0, missing))
        texts = [documents[i] for i in chosen]
        random.Random(ORDER).shuffle(texts)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
        return TEMPLATE.format(context=context, query=query)

    def measure(number: int) -> int:
        return request.count(f"{draw_text(0, number)} {questions[0].answers}")

    def draw(index: int, number: int) -> Example:
        text = draw_text(index, number)
        prompt = text + ("" if text[-1].isspace() else " ") + "Answer:"
        return Example(prompt, questions[index].answers, request.count(text) + request.new_tokens)

    most = max(1, most_units(measure, request.length - request.new_tokens, STEP, most=len(documents)))

    def tries(index: int) -> list[int]:
        fewest = len(questions[index].documents)
        return [*range(max(most, fewest), fewest, -STEP), fewest]

    yield from fitting_examples(request, draw, tries)
