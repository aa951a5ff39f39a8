"""Multi-query associative recall (MQAR): key-value pairs, then some of the keys again, each to be answered with its value.

    k1 v1 k2 v2 k3 v3  . . k2 v2 . . . . k1 v1 . . k3 v3 .         ('.' is filler; only the answers are scored)

The task and the law of its gaps are those of Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language
Models" (2023): every key is asked once, in a slot two tokens wide drawn without replacement with probability proportional to
i^(power - 1), i the slot counted from the pairs on, so that short gaps are common and long ones occur. As in any text, and
unlike there, the answer follows its query in the input, so that a target is always the next token.

A problem is a function of (seed, index) alone, and can be had without those before it.
"""

from dataclasses import dataclass

import numpy as np

from hybrid_jax.config import MQARConfig
from hybrid_jax.data import DataError


@dataclass(frozen=True)
class Task:
    """How hard the recall is.

    Attributes:
        pairs: the associations to be kept, each asked for once.
        length: tokens a problem, at least 4 * pairs.
        alphabet: how many keys there are, and how many values, and how many fillers, all different ids.
        power: the exponent of the law of gaps.

    Raises `DataError` where a problem cannot be made.
    """

    pairs: int
    length: int
    alphabet: int
    power: float = 0.01

    def __post_init__(self):
        if not 1 <= self.pairs <= self.alphabet:
            raise DataError(f"MQAR with {self.pairs} pairs of an alphabet of {self.alphabet}: give 1 <= pairs <= alphabet")
        if self.length < 4 * self.pairs:
            raise DataError(f"MQAR of {self.pairs} pairs in {self.length} tokens: a problem needs length >= 4 * pairs = {4 * self.pairs}")

    def check(self, window: int, vocabulary: int) -> None:
        """Raise `DataError` unless problems fit a row of ``window`` tokens of ``vocabulary``."""
        if self.length > window:
            raise DataError(f"an MQAR problem of {self.length} tokens in a window of {window}: make it shorter, or the window longer")
        if 3 * self.alphabet >= vocabulary:
            raise DataError(
                f"MQAR with an alphabet of {self.alphabet} in a vocabulary of {vocabulary}: keys, values and filler are three times "
                f"that, and the last id stays free; give an alphabet of at most {(vocabulary - 1) // 3}"
            )


def tasks(config: MQARConfig) -> list[Task]:
    """The kinds of problems that a run's configuration names. Raises `DataError` for one that cannot be made."""
    return [Task(pairs, length, config.alphabet) for pairs, length in zip(config.pairs, config.length, strict=True)]


def sample(task: Task, seed: int, index: int, *, vocabulary: int, problems: int = 1):
    """``problems`` problems: ``(tokens, targets, weights)``, each [problems, length]; int32, int32, float32.

    ``targets`` are the next tokens (the last one's, which there is none for, is its own token) and ``weights`` are 1 where a
    token is a query, whose target is the value paired with it, and 0 elsewhere. Ids are the ``3 * alphabet`` below
    ``vocabulary - 1`` (rare tokens in text; the last id, often a document's end, is left alone): keys, values, filler.
    """
    P, A, L = task.pairs, task.alphabet, task.length
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    first = vocabulary - 1 - 3 * A

    def distinct(count, weights):  # [problems, count] indices, drawn without replacement by `weights`: the soonest of exponential clocks
        clocks = -np.log1p(-rng.random((problems, len(weights)))) / weights
        return np.argsort(clocks, axis=1, kind="stable")[:, :count]

    slots = (L - 2 * P) // 2
    keys = first + distinct(P, np.ones(A))
    values = first + A + distinct(P, np.ones(A))
    queries = 2 * P + 2 * distinct(P, np.arange(1, slots + 1) ** (task.power - 1))  # positions
    tokens = first + 2 * A + (rng.random((problems, L)) * A).astype(np.int32)
    tokens[:, 0 : 2 * P : 2], tokens[:, 1 : 2 * P : 2] = keys, values
    np.put_along_axis(tokens, queries, keys, axis=1)
    np.put_along_axis(tokens, queries + 1, values, axis=1)
    targets = np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    weights = np.zeros((problems, L), np.float32)
    np.put_along_axis(weights, queries, 1.0, axis=1)
    return tokens.astype(np.int32), targets.astype(np.int32), weights


def row(task: Task, seed: int, index: int, *, window: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Row ``index``: as many problems as fit ``window``, each a segment of its own, and padding.

    Returns ``tokens``, ``targets``, ``segment_ids`` ([window] int32; 0 is padding) and ``weights`` ([window] float32).
    """
    problems = window // task.length
    used = problems * task.length
    tokens, targets, weights = (part.ravel() for part in sample(task, seed, index, vocabulary=vocabulary, problems=problems))
    segment_ids = np.repeat(np.arange(1, problems + 1, dtype=np.int32), task.length)
    columns = {"tokens": tokens, "targets": targets, "weights": weights, "segment_ids": segment_ids}
    return {name: np.pad(column, (0, window - used)) for name, column in columns.items()}
