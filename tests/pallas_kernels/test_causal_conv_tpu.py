"""The TPU kernels of the short convolution: many chunks and columns, in the interpreter that looks for races and stale memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import segments
from pallas_kernels.causal_conv import causal_conv, tpu
from tests.helpers import random_segment_ids, tree_errors
from tests.pallas_kernels import test_stretches
from tests.pallas_kernels.test_causal_conv import ROWS, example, value_and_gradients


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 tokens, one column of channels a block."""
    monkeypatch.setattr(tpu, "CHUNK", tpu.Chunk(tokens=128, row_bytes=512))
    value_and_gradients.clear_cache()
    yield
    value_and_gradients.clear_cache()


def errors(arguments, segment_ids, activation="silu"):
    """Of the kernels' output, final state and gradients, against the reference in float64."""
    found = value_and_gradients(arguments, segment_ids, "pallas", activation)
    with jax.enable_x64(True):
        exact = {name: a.astype(jnp.float64) for name, a in arguments.items()}
        return tree_errors(found, value_and_gradients(exact, segment_ids, "reference", activation))


@pytest.mark.parametrize(
    "T, D, W, mean_length, activation",
    [(300, 130, 4, 40, "silu"), (256, 3, 4, None, None), (129, 3, 4, None, "silu"), (263, 2, 2, 3, None), (130, 3, 1, 20, "silu")],
)
def test_chunks_and_columns(small_chunks, T, D, W, mean_length, activation):
    segment_ids = None if mean_length is None else random_segment_ids(np.random.default_rng(T), 2, T, mean_length)
    arguments = example(T, 2, T, D, W)
    if segment_ids is not None:
        arguments["x"] = jnp.where(segment_ids[:, :, None] == 0, jnp.nan, arguments["x"])
    found = errors(arguments, segment_ids, activation)
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("dtype, bound", [pytest.param(jnp.float32, 1e-6, marks=pytest.mark.slow), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize("documents", [True, False])
def test_no_races_and_nothing_read_before_it_is_written(small_chunks, capsys, documents, dtype, bound):
    interpreter = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    segment_ids = np.tile(ROWS, (1, 11))[3:5]  # 143 tokens: a chunk and a part of one
    arguments = example(0, *segment_ids.shape, 3, 4, dtype)
    with pltpu.force_tpu_interpret_mode(interpreter):
        found = errors(arguments, jnp.asarray(segment_ids) if documents else None)
    assert max(found.values()) < bound, found
    assert "RACE" not in capsys.readouterr().out.upper()


def test_passes_do_not_see_padding(small_chunks):
    """Told apart by an index of -1, whatever x and dy hold there."""
    index, real = segments.number(jnp.tile(ROWS[2:5], (1, 11)))
    rng = np.random.default_rng(2)
    x, dy = (jnp.asarray(rng.normal(size=(*index.shape, 3)), jnp.float32) for _ in range(2))
    weight, state = example(3, len(index), 1, 3, 4)["weight"], example(4, len(index), 1, 3, 4)["initial_state"]

    def run(index, fill):
        x_, dy_ = (jnp.where(real[:, :, None], a, fill) for a in (x, dy))
        forward, backward = tpu.PASSES
        y = jnp.where(real[:, :, None], forward("silu", x_, weight, state, index), fill)
        return y, *backward("silu", x_, weight, state, index, dy_)

    y, dx, dweight, dstate = jax.jit(run)(index, 0.0)
    expected = y, jnp.where(real[:, :, None], dx, 0), dweight, dstate
    found = jax.jit(run)(jnp.where(real, index, -1), jnp.nan)
    assert np.all(np.isnan(found[0][~real]))
    assert max(tree_errors((jnp.where(real[:, :, None], found[0], 0), *found[1:]), expected).values()) < 1e-6


def test_two_parts_are_one_sequence(small_chunks):
    arguments = example(3, 2, 200, 4, 4)

    def run(x, state):
        return causal_conv(x, arguments["weight"], initial_state=state, activation="silu", implementation="pallas")

    x, state = arguments["x"], arguments["initial_state"]
    first, middle = run(x[:, :77], state)
    second, last = run(x[:, 77:], middle)
    assert max(tree_errors((jnp.concatenate([first, second], axis=1), last), run(x, state)).values()) < 1e-6


def test_row_by_row_under_vmap(small_chunks):
    arguments = example(6, 3, 150, 4, 4)
    weight = arguments.pop("weight")

    def loss(x, initial_state):
        run = jax.checkpoint(partial(causal_conv, activation="silu", implementation="pallas"))
        y, state = run(x, weight, initial_state=initial_state)
        return jnp.sum(y**2, axis=(1, 2)) + jnp.sum(state**2, axis=(1, 2))

    def one(x, initial_state):
        return loss(x[None], initial_state[None])[0]

    both = jax.value_and_grad(lambda arguments: jnp.sum(loss(**arguments))), jax.vmap(jax.value_and_grad(one, argnums=(0, 1)))
    value, gradients = jax.jit(both[0])(arguments)
    values, (dx, dstate) = jax.jit(both[1])(arguments["x"], arguments["initial_state"])
    found, expected = (jnp.sum(values), dx, dstate), (value, gradients["x"], gradients["initial_state"])
    assert max(tree_errors(found, expected).values()) < 1e-6


def test_stretches_on_four_devices(small_chunks):
    operator = test_stretches.OPERATORS["conv"]
    rng = np.random.default_rng(5)
    T = 4 * 131
    given = {name: jnp.asarray(a, jnp.float32) for name, a in test_stretches.arguments(rng, operator, T, strong=False).items()}
    segment_ids = random_segment_ids(rng, test_stretches.B, T, mean_length=40)
    found, expected = test_stretches.both(operator, 4, given, segment_ids, "pallas")
    assert max(tree_errors(found, expected).values()) < 1e-6


@pytest.mark.parametrize("D, kernel", [(256, True), (192, False)])
def test_chosen_where_channels_fill_registers(D, kernel):
    shapes = jax.eval_shape(lambda: example(0, 2, 16, D, 4))
    exported = jax.export.export(jax.jit(value_and_gradients, static_argnums=2), platforms=["tpu"])(shapes, None, None)
    assert ("causal_conv_forward" in exported.mlir_module()) == ("causal_conv_backward" in exported.mlir_module()) == kernel


def test_what_the_kernel_does_not_take_is_refused_by_name_and_not_chosen():
    many_taps = example(0, 1, 5, 128, 5)
    with pytest.raises(ValueError, match=r"weight \(128, 5\), need T >= 1 and at most 4 taps for implementation='pallas'"):
        causal_conv(**many_taps, implementation="pallas")
    assert not tpu.is_faster(many_taps["x"], many_taps["weight"])
    with jax.enable_x64(True):
        arguments = example(0, 1, 5, 128, 4, jnp.float64)
        with pytest.raises(ValueError, match="causal_conv: x has dtype float64, needs float32 or bfloat16 for implementation='pallas'"):
            causal_conv(**arguments, implementation="pallas")
        assert causal_conv(**arguments)[0].dtype == jnp.float64
