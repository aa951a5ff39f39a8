"""Sampling against its definition in numpy: what the filters keep, at their boundaries and for equal tokens, and how often it is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybrid_jax.sampling import Sampling, sample, sampling


def definition(logits, temperature, top_k, top_p, min_p) -> tuple[np.ndarray, float]:
    """[V] probabilities, float64, token by token; and how near top_p and min_p are to deciding otherwise."""
    p = np.exp((logits - np.max(logits)) / temperature)
    ranked = sorted(range(len(p)), key=lambda token: (-p[token], token))[:top_k]
    p = p / p[ranked].sum()
    kept, before, margin = [], 0.0, np.inf
    for token in ranked:
        margin = min(margin, abs(before - top_p), abs(p[token] / p[ranked[0]] - min_p))
        if before < top_p and p[token] >= min_p * p[ranked[0]]:
            kept.append(token)
        before += p[token]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum(), margin


@jax.jit
def draws(logits, seed, setting):
    keys = jax.random.split(jax.random.key(seed), 500)
    return sample(jnp.broadcast_to(logits, (500, len(logits))), keys, setting)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-3, 3), min_size=7, max_size=7),  # with many equal ones
    temperature=st.floats(0.3, 3.0),
    top_k=st.integers(1, 9),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31 - 1),
)
def test_what_is_drawn_is_what_the_filters_keep(logits, temperature, top_k, top_p, min_p, seed):
    expected, margin = definition(np.array(logits, float), temperature, top_k, top_p, min_p)
    assume(margin > 1e-5)  # nearer, float32 may round to the other side
    setting = Sampling(temperature, top_k, top_p, min_p)
    counts = np.bincount(np.asarray(draws(jnp.array(logits, jnp.float32), seed, setting)), minlength=7)
    assert not counts[expected == 0].any()
    assert all(counts[expected > 0.05])  # missed by chance once in 10^11
    assert np.all(np.abs(counts - 500 * expected) < 6 * np.sqrt(500 * expected) + 3)


EDGES = {  # setting -> the tokens kept of eight equal ones, of which each has probability 1/8 exactly
    "top_k": (dict(top_k=3), 3),
    "top_k of more than there are": (dict(top_k=100), 8),
    "top_p just reached": (dict(top_p=0.5), 4),
    "top_p just missed": (dict(top_p=0.500001), 5),
    "top_p tiny": (dict(top_p=1e-9), 1),
    "top_p whole": (dict(top_p=1.0), 8),
    "min_p equal": (dict(min_p=1.0), 8),
    "min_p none": (dict(min_p=0.0), 8),
    "top_p of what top_k leaves": (dict(top_k=4, top_p=0.5), 2),
}


@pytest.mark.parametrize("setting, count", EDGES.values(), ids=EDGES.keys())
def test_edges(setting, count):
    found = draws(jnp.zeros(8), 0, sampling(1.0, **setting))
    assert sorted(set(found.tolist())) == list(range(count))  # of equal tokens the lowest ids


def test_min_p_compares_with_the_likeliest():
    logits = jnp.log(jnp.array([0.5, 0.26, 0.24]))
    assert set(draws(logits, 0, sampling(1.0, min_p=0.5)).tolist()) == {0, 1}


def test_greedy():
    logits = jnp.array([[1.0, 3.0, 3.0], [-1e30, -2e30, -3e30]])
    keys = jax.random.split(jax.random.key(0), 2)
    for setting in (sampling(), sampling(0.0, top_k=2, top_p=0.5, min_p=0.1), sampling(1e-30), sampling(5.0, top_k=1)):
        first = sample(logits, keys, setting)
        assert first[1] == 0 and (first[0] == 1 or setting == sampling(1e-30))  # equal ones stay equal at any temperature


def test_a_large_vocabulary_keeps_its_tail():
    """Without a filter nothing is cut off, and top_p near 1 cuts no more than it may in float32."""
    logits = jnp.zeros(10_000)
    assert len(set(draws(logits, 3, sampling(1.0)).tolist())) > 460
    assert max(draws(logits, 3, sampling(1.0, top_p=0.999)).tolist()) > 9_000


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(temperature=-0.1), "temperature is -0.1, needs a number of at least 0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_k=0), "top_k is 0, needs to be at least 1"),
        (dict(top_p=0.0), "top_p is 0.0, needs to be above 0 and at most 1"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(min_p=-0.1), "min_p is -0.1, needs to be from 0 to 1"),
        (dict(min_p=2.0), "min_p is 2.0"),
    ],
)
def test_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        sampling(**setting)
