"""A model on RULER's tasks: prompts in batches, the likeliest text after each, the share of the answers in it."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hybrid_jax.config.errors import meant
from hybrid_jax.data import DataError
from hybrid_jax.evals.ruler import score
from hybrid_jax.evals.ruler.examples import Example
from hybrid_jax.evals.ruler.tasks import GROUPS, SEED, TASKS, make_examples
from hybrid_jax.evals.ruler.texts import Texts
from hybrid_jax.evals.writing import write
from hybrid_jax.sampling import Sampling


def evaluate(
    model,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (4096,),
    examples: int = 500,
    texts=None,
    batch: int = 8,
    beginning: int | None = None,
) -> dict[str, Any]:
    """What ``model`` (`hybrid_jax.load`, with its tokenizer) scores at ``tasks``, at each of ``lengths``; ready for JSON.

    examples: of a task and length. A task and length has the same examples whatever else is asked for.
    texts: a folder with texts that some tasks are made of (`hybrid_jax.evals.ruler.texts`); None: all have substitutes.
    batch: prompts read and followed at once.
    beginning: a token that stands before every prompt (see `harness.HarnessModel`); lengths are without it.

    Returns:
        settings    the arguments, and the tokenizer's name
        scores      {task: {length: {...}}}: ``score`` (the mean share of the answers found), ``examples`` (those that fit),
                    ``tokens`` (their mean length), ``source`` (the texts they are made of, or "generated"), and of QA
                    ``any`` (the share of examples with any of their answers found, RULER's own score)
        groups      {length: {group: mean score}}: the study's groups and the ``mean`` over the 13 tasks, where all of a group's are there

    Raises `DataError` before the model runs: for a task not known, a length too short for a task, a model without its
    tokenizer, a folder that holds no such texts.
    """
    tokenizer = _checked_tokenizer(model)
    _check(tasks, lengths, examples, batch)
    texts = Texts(texts)
    cells = {}
    for name, length in itertools.product(tasks, lengths):
        source, made = make_examples(name, tokenizer, texts, length=length, examples=examples)
        cells[name, length] = source, itertools.chain([next(made)], made)  # which tells whether any fits
    scores = {name: {} for name in tasks}
    for (name, length), (source, made) in cells.items():
        scores[name][str(length)] = _score(model, name, length, made, batch, beginning) | {"source": source}
    settings = {"tasks": list(tasks), "lengths": list(lengths), "examples": examples, "batch": batch, "seed": SEED, "beginning": beginning}
    settings |= {"texts": texts.folder and str(texts.folder), "tokenizer": tokenizer.name}
    return {"settings": settings, "scores": scores, "groups": {str(length): _groups(scores, str(length)) for length in lengths}}


def _score(model, name: str, length: int, made: Iterable[Example], batch: int, beginning: int | None) -> dict[str, float | int]:
    rows, first, new_tokens = list(made), [] if beginning is None else [beginning], TASKS[name].new_tokens
    prompts = [first + tokens for tokens in model.tokenizer.encode_batch([row.prompt for row in rows])]
    written = write(model, prompts, new_tokens, settings=Sampling(), stop=(), batch=batch, what=f"{name} at {length:,} tokens")
    answered = [(text, row.answers) for text, row in zip(written, rows, strict=True)]
    result = {
        "score": float(np.mean([score.share_found(*pair) for pair in answered])),
        "examples": len(rows),
        "tokens": float(np.mean([row.tokens for row in rows])),
    }
    return result | {"any": float(np.mean([score.any_found(*pair) for pair in answered]))} if name in GROUPS["QA"] else result


def _groups(scores: dict[str, dict], length: str) -> dict[str, float]:
    whole = {group: names for group, names in GROUPS.items() if all(name in scores for name in names)}
    return {group: float(np.mean([scores[name][length]["score"] for name in names])) for group, names in whole.items()}


def _checked_tokenizer(model):
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise DataError("the model has no tokenizer, which RULER's prompts are made with: set model.tokenizer")
    if tokenizer.vocabulary > model.config.vocabulary:
        raise DataError(f"the tokenizer has {tokenizer.vocabulary} tokens and the model {model.config.vocabulary}: set the model's own")
    return tokenizer


def _check(tasks: Sequence[str], lengths: Sequence[int], examples: int, batch: int) -> None:
    for name in tasks:
        if name not in TASKS:
            hint = meant(name, TASKS, f"there are {', '.join(TASKS)}", form="{!r}", most=1)
            raise DataError(f"RULER has no task {name!r}; {hint}")
    for what, values in {"tasks": tasks, "lengths": lengths}.items():
        if not values or len(set(values)) < len(values):
            raise DataError(f"{what} is {list(values)}, needs one at least, and none twice")
    for what, value in {"a length": min(lengths), "examples": examples, "batch": batch}.items():
        if value < 1:
            raise DataError(f"{what} is {value}, needs to be at least 1")
