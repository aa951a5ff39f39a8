"""The TPU kernel of the elementwise recurrence: many chunks and columns, in the interpreter that looks for races and stale memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_scan import linear_scan, tpu
from tests.helpers import random_segment_ids, tree_errors
from tests.pallas_kernels.test_linear_scan import ROWS, errors, example, value_and_gradients


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 tokens, 2 runs a row, one column of channels a block."""
    monkeypatch.setattr(tpu, "DEFAULT", tpu.Chunk(span=16, groups=2, row_bytes=512))
    value_and_gradients.clear_cache()
    yield
    value_and_gradients.clear_cache()


@pytest.mark.parametrize("T, D, mean_length", [(128, 130, 40), (300, 3, 40), (256, 3, None)])
def test_chunks_and_columns(small_chunks, T, D, mean_length):
    segment_ids = None if mean_length is None else random_segment_ids(np.random.default_rng(T), 2, T, mean_length)
    found = errors(example(T, 2, T, D, segment_ids), segment_ids, "pallas", jnp.float32)
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("dtype, bound", [pytest.param(jnp.float32, 1e-6, marks=pytest.mark.slow), (jnp.bfloat16, 2**-8)])
def test_no_races_and_nothing_read_before_it_is_written(small_chunks, capsys, dtype, bound):
    interpreter = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    segment_ids = np.tile(ROWS, (1, 11))[3:5]  # 143 tokens: a chunk and a part of one
    arguments = example(0, *segment_ids.shape, 3, segment_ids)
    exact = jax.tree.map(lambda a: jnp.asarray(a, dtype), arguments)
    expected = value_and_gradients(exact, segment_ids, "xla")
    with pltpu.force_tpu_interpret_mode(interpreter):
        found = tree_errors(value_and_gradients(exact, segment_ids, "pallas"), expected)
    assert max(found.values()) < bound, found
    assert "RACE" not in capsys.readouterr().out.upper()


def test_two_parts_are_one_sequence(small_chunks):
    arguments = example(3, 2, 200, 4, dtype=np.float32)
    decay, x, state = arguments["decay"], arguments["x"], arguments["initial_state"]

    def run(decay, x, state):
        return linear_scan(decay, x, initial_state=state, implementation="pallas")

    h, final_state = run(decay, x, state)
    first, middle = run(decay[:, :77], x[:, :77], state)
    second, last = run(decay[:, 77:], x[:, 77:], middle)
    assert max(tree_errors((jnp.concatenate([first, second], axis=1), last), (h, final_state)).values()) < 1e-6


def test_float64_is_refused_by_name_and_not_chosen():
    with jax.enable_x64(True):
        arguments = example(0, 1, 5, 3)
        with pytest.raises(ValueError, match="linear_scan: decay has dtype float64, needs float32 or bfloat16 for implementation='pallas'"):
            linear_scan(**arguments, implementation="pallas")
        assert linear_scan(**arguments)[0].dtype == jnp.float64
