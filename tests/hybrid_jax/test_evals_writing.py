"""Prompts written on by all devices of a process, each with rows of its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import config, generate
from hybrid_jax.data.tokenizers import ByteTokenizer
from hybrid_jax.evals.processes import on_local_devices, rows_at_once
from hybrid_jax.evals.writing import write
from hybrid_jax.generation import Session
from hybrid_jax.sampling import sampling
from tests.hybrid_jax.eval_models import small_model

GREEDY = sampling(0.0, None, None, None)
COLLECTIVE = re.compile(r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(")


@pytest.fixture(scope="module")
def model():
    return small_model(config.GLA(heads=2, conv_width=4), ByteTokenizer())


def test_they_are_what_one_device_writes(model):
    prompts = [list(b"a word of %d" % i) * (1 + i % 3) for i in range(11)]  # more than the eight devices take at once
    written = generate(model, prompts, max_new_tokens=6)
    assert write(model, prompts, 6, settings=GREEDY, stop=(), batch=1) == [model.tokenizer.decode(tokens) for tokens in written]


def test_each_batch_draws_its_own(model):
    """Of one prompt again and again, in batches of the eight devices: another noise in each."""
    drawn = write(model, [list(b"a word of 1")] * 16, 6, settings=sampling(2.0, None, None, None), stop=(), batch=1)
    assert len(set(drawn)) > 8 and drawn[:8] != drawn[8:]


@pytest.mark.parametrize("mixer", [config.HGRN(), config.GLA(heads=2, conv_width=4), config.KDA(heads=2, head_width=8)])
def test_devices_tell_each_other_nothing(mixer):
    """But how far the caches are filled, at most, which the chunks of a prompt are compared with."""
    mesh, model = on_local_devices(small_model(mixer))
    rows = rows_at_once(mesh, 2, 100)
    assert rows == 2 * len(jax.devices()) and rows_at_once(mesh, 2, 3) == len(jax.devices())
    with jax.set_mesh(mesh):
        session = Session(model, rows)
        session._reserve(64)
        for leaf in jax.tree.leaves(session._cache.stages):
            assert leaf.sharding.shard_shape(leaf.shape)[2] == 2, leaf.shape
        params, cache, choice = session._params, session._cache, (GREEDY, np.array([256], np.int32))
        tokens, real, ended = np.zeros((rows, 32), np.int32), np.ones((rows, 32), bool), np.zeros(rows, bool)
        read = session._programs.read.lower(params, tokens, real, cache).compile()
        step = session._programs.step.lower(params, cache, jnp.zeros(rows, jnp.int32), ended, session._keys, 0, *choice).compile()
    assert set(COLLECTIVE.findall(read.as_text())) <= {"s32[]"}
    assert not COLLECTIVE.findall(step.as_text())
