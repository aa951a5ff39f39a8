"""Log-probabilities of packed requests, against each request alone, its softmax in float64."""

import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import config
from hybrid_jax.evals import likelihood, processes
from hybrid_jax.evals.likelihood import log_likelihoods, pack
from tests.hybrid_jax.eval_models import small_model

MAX_LENGTH = 32
VOCABULARY = 61


def requests(count=40, seed=0):
    """Contexts and continuations of every length that there may be, some longer together than MAX_LENGTH."""
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(1, 40)), int(rng.integers(1, 12))) for _ in range(count)]
    lengths += [(1, 1), (1, MAX_LENGTH), (60, MAX_LENGTH), (MAX_LENGTH, 1)]
    return [tuple(rng.integers(0, VOCABULARY, n).tolist() for n in pair) for pair in lengths]


def alone(model, context, continuation):
    """The definition: one request, no packing, no padding that could matter, in float64."""
    kept = [*context, *continuation][-MAX_LENGTH - 1 :]
    tokens = np.zeros((1, MAX_LENGTH), np.int32)  # padded after the text, which no causal model sees: one length, one compilation
    tokens[0, : len(kept) - 1] = kept[:-1]
    logits = np.asarray(model(jnp.array(tokens)), np.float64)[0, : len(kept) - 1][-len(continuation) :]
    log_probabilities = (
        logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    )
    return log_probabilities[np.arange(len(continuation)), continuation].sum(), logits.argmax(-1).tolist() == list(continuation)


def likely(model, context, length):
    """The continuation that greedy decoding writes."""
    row = list(context)
    for _ in range(length):
        padded = jnp.array([row + [0] * (MAX_LENGTH - len(row))])
        row.append(int(model(padded)[0, len(row) - 1].argmax()))
    return row[len(context) :]


@pytest.fixture(scope="module")
def model():
    """Linear layers with state and convolution, and one of attention."""
    return small_model(config.GatedDeltaNet(heads=2, head_width=12), vocabulary=VOCABULARY)


@pytest.fixture
def one_device(monkeypatch):
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


def test_they_are_those_of_each_request_alone(model):
    """Over the eight devices of the tests."""
    forward = jax.jit(model)
    asked = requests()
    asked += [(context, likely(forward, context, 3)) for context, _ in asked[:6] if len(context) < MAX_LENGTH - 3]
    found = log_likelihoods(model, asked, max_length=MAX_LENGTH, batch=2)
    expected = [alone(forward, *pair) for pair in asked]
    np.testing.assert_allclose([x.log_probability for x in found], [x for x, _ in expected], rtol=2e-5)
    assert [x.greedy for x in found] == [x for _, x in expected]
    assert 3 <= sum(x.greedy for x in found) < len(found)


def test_packing_changes_nothing_and_compilations_are_few(model, one_device, monkeypatch):
    asked = requests(seed=1)
    found = log_likelihoods(model, asked, max_length=MAX_LENGTH, batch=2)
    monkeypatch.setattr(likelihood, "ROW", 8)  # rows of 8, 16 and 32 tokens, at most
    monkeypatch.setattr(likelihood, "LOGITS", 16)
    compiled = likelihood._score._cache_size()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(asked))[seed:]  # other company, another place
        again = log_likelihoods(model, [asked[i] for i in order], max_length=MAX_LENGTH, batch=1)
        np.testing.assert_allclose([x.log_probability for x in again], [found[i].log_probability for i in order], rtol=2e-5)
        assert [x.greedy for x in again] == [found[i].greedy for i in order]
    assert likelihood._score._cache_size() - compiled <= 3


@given(st.lists(st.integers(1, 300), max_size=60), st.sampled_from([16, 64, 512]))
def test_pack(lengths, shortest):
    rows = pack(lengths, shortest)
    assert sorted(i for _, held in rows for i in held) == list(range(len(lengths)))
    for width, held in rows:
        assert width >= shortest and width & (width - 1) == 0 and sum(lengths[i] for i in held) <= width
        assert width == shortest or max(lengths[i] for i in held) > width // 2  # no longer than its longest needs
    assert sum(lengths) > sum(width for width, _ in rows) / 2 - shortest  # no two rows that one would have held


MISTAKES = {
    "no context": (([], [1]), "request 1 has an empty context"),
    "no continuation": (([1], []), "request 1 has an empty continuation"),
    "a token too large": (([1], [VOCABULARY]), f"request 1 holds token {VOCABULARY}, needs tokens from 0 to {VOCABULARY - 1}"),
    "too long": (([1], [1] * (MAX_LENGTH + 1)), f"request 1 has a continuation of 33 tokens, needs at most max_length, {MAX_LENGTH}"),
}


@pytest.mark.parametrize("request_, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_told(model, request_, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(model, [([1], [2]), request_], max_length=MAX_LENGTH)


@given(st.lists(st.integers(0, 9)), st.integers(1, 4))
def test_shares_come_together(items, count):
    """What each of ``count`` processes computes, put together by each of them, is what one alone computes."""
    parts = [None] * count

    def run(process):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: count)
            patch.setattr(jax, "process_index", lambda: process)
            patch.setattr(processes, "gather", lambda content: parts.__setitem__(process, content) or parts)
            return processes.shared(lambda mine: [[0.1 + x, str(x)] for x in mine], items, size=lambda x: x)

    for process in range(count):
        try:
            run(process)  # to know its part; the others' are not there yet
        except TypeError:
            pass
    sizes = [len(json.loads(part)) for part in parts] if count > 1 else [len(items)]
    assert max(sizes) - min(sizes) <= 1
    assert all(run(process) == [[0.1 + x, str(x)] for x in items] for process in range(count))


PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from hybrid_jax import config
from hybrid_jax.evals.likelihood import log_likelihoods
from hybrid_jax.evals.writing import write
from hybrid_jax.sampling import Sampling
from tests.hybrid_jax.test_evals_likelihood import MAX_LENGTH, requests
from tests.hybrid_jax.eval_models import small_model
from tests.hybrid_jax.test_generation import Pairs
model = small_model(config.GLA(heads=2), Pairs(), vocabulary=61)
asked = requests(9)
print(jax.process_count(), [tuple(x) for x in log_likelihoods(model, asked, max_length=MAX_LENGTH, batch=1)])
print(write(model, [context for context, _ in asked], 5, settings=Sampling(), stop=[], batch=4))
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESS, address]
    started = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    printed = [process.communicate(timeout=300)[0].splitlines()[-2:] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed[0] == printed[1] and printed[0][0].startswith("2 ")
    alone = subprocess.run([sys.executable, "-c", PROCESS.replace("jax.distributed", "#")], check=True, capture_output=True, text=True)
    one = alone.stdout.splitlines()[-2:]
    assert one[1] == printed[0][1]
    values = [np.array(eval(line.split(" ", 1)[1]), np.float64) for line in (one[0], printed[0][0])]
    np.testing.assert_allclose(*values, rtol=2e-5)
