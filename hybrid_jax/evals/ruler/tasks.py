"""The 13 tasks: how each is made, what it needs, and how the study groups their scores."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hybrid_jax.data.tokenizers import Tokenizer
from hybrid_jax.evals.ruler import questions, words
from hybrid_jax.evals.ruler.examples import Example, Request
from hybrid_jax.evals.ruler.needles import Needles
from hybrid_jax.evals.ruler.texts import Texts
from hybrid_jax.evals.ruler.tracing import Tracing

NO_TEXTS = "generated"


class Task(NamedTuple):
    """One of RULER's.

    Attributes:
        make: a function of a request and the texts, which gives examples.
        new_tokens: how many the model may write.
        texts: which of `Texts` it needs; None: it needs none.
    """

    make: Callable[[Request, Any], Iterator[Example]]
    new_tokens: int
    texts: str | None = None


def _needles(hay: str, **options) -> Task:
    return Task(Needles(hay, **options).examples, 128, "essays" if hay == "essays" else None)


TASKS = {
    "niah_single_1": _needles("noise"),
    "niah_single_2": _needles("essays"),
    "niah_single_3": _needles("essays", value="uuids"),
    "niah_multikey_1": _needles("essays", keys=4),
    "niah_multikey_2": _needles("needles"),
    "niah_multikey_3": _needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": _needles("essays", values=4),
    "niah_multiquery": _needles("essays", keys=4, queries=4),
    "ruler_vt": Task(lambda request, _: Tracing(request.seed).examples(request), 30),
    "ruler_cwe": Task(lambda request, _: words.common_words(request), 120),
    "ruler_fwe": Task(lambda request, _: words.frequent_words(request), 50),
    "ruler_qa_squad": Task(questions.examples, 32, "squad"),
    "ruler_qa_hotpot": Task(questions.examples, 32, "hotpot"),
}

GROUPS = {
    "Single": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "MK": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "MQ": ("niah_multiquery",),
    "MV": ("niah_multivalue",),
    "CWE+FWE": ("ruler_cwe", "ruler_fwe"),
    "QA": ("ruler_qa_squad", "ruler_qa_hotpot"),
    "VT": ("ruler_vt",),
    "mean": tuple(TASKS),  # over the tasks, not over the groups
}


SEED = 42  # of the harness's draws


def make_examples(
    name: str, tokenizer: Tokenizer, texts: Texts, *, length: int = 4096, examples: int = 500, seed: int = SEED
) -> tuple[str, Iterator[Example]]:
    """(what texts they are made of, examples of task ``name``), a function of the arguments alone.

    tokenizer: what measures ``length``, the tokens that a prompt and what is written after it take, at most. The prompts of
        ruler_fwe take so many without what is written, and the start of the answer, which ends a prompt, is not counted by the
        niah tasks and the QA ones: as in lm-evaluation-harness.
    examples: how many; one that does not fit is left out, as there.

    Raises `DataError` for texts that cannot be read and, at the first example, for a length with no room for any.
    """
    task = TASKS[name]
    needed = getattr(texts, task.texts) if task.texts else None
    request = Request(name, tokenizer, length, examples, seed, task.new_tokens)
    return needed.source if needed else NO_TEXTS, task.make(request, needed)
