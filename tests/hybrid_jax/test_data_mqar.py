"""MQAR: every answer is the paired value, problems are functions of (seed, index), gaps follow their law."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.data import DataError, mqar


@st.composite
def problems(draw):
    pairs = draw(st.integers(1, 20))
    alphabet = draw(st.integers(pairs, 40))
    task = mqar.Task(pairs=pairs, length=draw(st.integers(4 * pairs, 4 * pairs + 60)), alphabet=alphabet)
    vocabulary = draw(st.integers(3 * alphabet + 1, 400))
    return task, vocabulary, draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**40))


@settings(deadline=None)
@given(problems())
def test_every_answer_is_the_paired_value(problem):
    """Solved by a dictionary, reading from left to right."""
    task, vocabulary, seed, index = problem
    P, A = task.pairs, task.alphabet
    tokens, targets, weights = mqar.sample(task, seed, index, vocabulary=vocabulary, problems=3)
    assert tokens.shape == targets.shape == weights.shape == (3, task.length)
    first = vocabulary - 1 - 3 * A
    assert tokens.min() >= first and tokens.max() < vocabulary - 1
    for row, target, weight in zip(tokens, targets, weights, strict=True):
        memory = dict(zip(row[0 : 2 * P : 2].tolist(), row[1 : 2 * P : 2].tolist(), strict=True))
        assert len(memory) == P == len(set(memory.values()))
        assert all(first <= key < first + A <= value < first + 2 * A for key, value in memory.items())
        asked = np.flatnonzero(weight)
        assert asked.min() >= 2 * P and set(weight.tolist()) <= {0.0, 1.0}
        assert sorted(row[asked]) == sorted(memory)  # each key once
        assert [memory[key] for key in row[asked].tolist()] == target[asked].tolist()
        np.testing.assert_array_equal(target[:-1], row[1:])  # the next token, as in text
        rest = np.ones(task.length, bool)
        rest[: 2 * P] = rest[asked] = rest[asked + 1] = False
        assert (row[rest] >= first + 2 * A).all()  # filler is neither key nor value


def test_a_function_of_seed_and_index():
    task = mqar.Task(pairs=4, length=32, alphabet=16)
    draws = {(seed, index): mqar.sample(task, seed, index, vocabulary=64)[0].tobytes() for seed in (0, 1, 7) for index in (0, 1, 2**33)}
    assert len(set(draws.values())) == len(draws)
    for (seed, index), tokens in reversed(draws.items()):
        assert mqar.sample(task, seed, index, vocabulary=64)[0].tobytes() == tokens


def test_first_problem_is_what_it_has_always_been():
    """Runs are repeatable across versions of this code and of numpy."""
    tokens, _, weights = mqar.sample(mqar.Task(pairs=2, length=10, alphabet=4), 1, 2, vocabulary=13)
    assert tokens.tolist() == [[2, 4, 0, 6, 2, 4, 0, 6, 8, 11]]
    assert weights.tolist() == [[0, 0, 0, 0, 1, 0, 1, 0, 0, 0]]


def test_gaps_follow_the_power_law():
    """One pair: its query is in slot i with probability proportional to i^(power - 1); four standard errors."""
    task = mqar.Task(pairs=1, length=18, alphabet=4)
    _, _, weights = mqar.sample(task, 0, 0, vocabulary=64, problems=20_000)
    share = weights.mean(axis=0)[2::2]
    expected = np.arange(1, 9) ** (task.power - 1)
    expected /= expected.sum()
    np.testing.assert_array_less(np.abs(share - expected), 4 * np.sqrt(expected / 20_000))


def test_what_can_be_had_without_recall():
    """Eight pairs in the least room: by the order of the queries alone 43 % of the answers, the likeliest of what is not yet asked."""
    P, probability = 8, defaultdict(lambda: defaultdict(float))  # of each key after those asked before it
    weights = np.arange(1, P + 1) ** (mqar.Task(P, 4 * P, 16).power - 1)
    for slots in itertools.permutations(range(P)):  # of the keys, in the order of the pairs
        left = weights.sum() - np.concatenate([[0], np.cumsum(weights[list(slots)])[:-1]])
        order = np.argsort(slots).tolist()
        for i in range(P):
            probability[tuple(order[:i])][order[i]] += np.prod(weights[list(slots)] / left)
    best = sum(max(keys.values()) for keys in probability.values()) / P
    assert best == pytest.approx(0.4299, abs=1e-4)

    tokens, _, weights = mqar.sample(mqar.Task(P, 4 * P, 16), 0, 0, vocabulary=64, problems=3000)
    right = 0
    for row, asked in zip(tokens, weights, strict=True):
        keys, before = row[0 : 2 * P : 2].tolist(), ()
        for key in row[np.flatnonzero(asked)]:
            likeliest = max(probability[before], key=probability[before].get)
            right += keys[likeliest] == key
            before += (keys.index(key),)
    assert right / (3000 * P) == pytest.approx(best, abs=0.012)  # four standard errors


def test_keys_and_values_are_uniform():
    task = mqar.Task(pairs=3, length=12, alphabet=10)
    tokens, _, _ = mqar.sample(task, 3, 0, vocabulary=31, problems=10_000)
    for column, first in (0, 0), (2, 0), (1, 10), (5, 10):
        share = np.bincount(tokens[:, column] - first, minlength=10) / 10_000
        np.testing.assert_array_less(np.abs(share - 0.1), 4 * np.sqrt(0.09 / 10_000))


@pytest.mark.parametrize("window", [32, 33, 100])
def test_rows_pack_problems(window):
    """As many as fit, each a segment, and padding of weight 0."""
    task = mqar.Task(pairs=4, length=32, alphabet=16)
    row = mqar.row(task, 5, 9, window=window, vocabulary=64)
    count = window // 32
    tokens, targets, weights = mqar.sample(task, 5, 9, vocabulary=64, problems=count)
    assert {name: (column.shape, column.dtype.name) for name, column in row.items()} == {
        name: ((window,), "float32" if name == "weights" else "int32") for name in ("tokens", "targets", "weights", "segment_ids")
    }
    for name, expected in ("tokens", tokens), ("targets", targets), ("weights", weights):
        np.testing.assert_array_equal(row[name][: 32 * count], expected.ravel())
    np.testing.assert_array_equal(row["segment_ids"], np.repeat([*range(1, count + 1), 0], [*[32] * count, window % 32]))
    assert row["weights"].sum() == 4 * count and not row["weights"][32 * count :].any()


def test_refused():
    for options, match in (
        (dict(pairs=0, length=8, alphabet=4), "0 pairs of an alphabet of 4: give 1 <= pairs <= alphabet"),
        (dict(pairs=5, length=20, alphabet=4), "5 pairs of an alphabet of 4: give 1 <= pairs <= alphabet"),
        (dict(pairs=4, length=15, alphabet=4), r"4 pairs in 15 tokens: a problem needs length >= 4 \* pairs = 16"),
    ):
        with pytest.raises(DataError, match=match):
            mqar.Task(**options)
    task = mqar.Task(pairs=4, length=32, alphabet=16)
    task.check(32, 49)
    with pytest.raises(DataError, match="problem of 32 tokens in a window of 31: make it shorter, or the window longer"):
        task.check(31, 49)
    with pytest.raises(DataError, match="alphabet of 16 in a vocabulary of 48: .* give an alphabet of at most 15"):
        task.check(32, 48)
