"""The short convolution against a numpy loop, these two implementations against each other, and its contract."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_conv import causal_conv, causal_conv_step
from tests.helpers import random_segment_ids, tree_errors

IMPLEMENTATIONS = ("reference", "xla")  # for any shapes and dtypes, on any platform; the kernels have tests of their own

# Rows of 13 tokens, one for each hard case: 1 document; several, an id used again; documents shorter than the taps;
# padding left, right, between and inside documents; nothing but padding.
ROWS = jnp.asarray(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [3, 3, 3, 3, 1, 1, 1, 1, 1, 3, 3, 3, 3],
        [1, 2, 3, 3, 1, 2, 2, 3, 1, 1, 2, 3, 3],
        [0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0],
        [0, 5, 0, 5, 5, 0, 0, 0, 5, 0, 4, 0, 4],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
CONTIGUOUS = ROWS[:3]  # no padding inside a document: the path on which nothing is moved


def example(seed, B, T, D, W, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    arrays = {"x": (B, T, D), "weight": (D, W), "initial_state": (B, W - 1, D)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in arrays.items()}


def numpy_loop(x, weight, initial_state, segment_ids):
    """The definition by lists of inputs: append a real token's, forget them where the document changes."""
    x, weight, initial_state = (np.asarray(a, np.float64) for a in (x, weight, initial_state))
    W = weight.shape[1]
    y, state = np.zeros_like(x), np.zeros_like(initial_state)
    for b, row in enumerate(np.asarray(segment_ids)):
        seen, document = list(initial_state[b]), None
        for t, segment in enumerate(row):
            if segment == 0:
                continue
            if document is not None and segment != document:
                seen = [np.zeros(x.shape[2])] * (W - 1)
            document = segment
            seen.append(x[b, t])
            y[b, t] = sum(weight[:, w] * seen[len(seen) - W + w] for w in range(W))
        state[b] = np.reshape(seen[len(seen) - W + 1 :], state[b].shape)
    return y, state


@partial(jax.jit, static_argnames=("implementation", "activation"))
def value_and_gradients(arguments, segment_ids, implementation, activation="silu"):
    """Output, final state and the gradients of a random-looking function of both."""

    def loss(arguments):
        y, state = causal_conv(**arguments, segment_ids=segment_ids, activation=activation, implementation=implementation)
        wave = [jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape) for a in (y, state)]
        return jnp.sum(y.astype(state.dtype) * wave[0]) + jnp.sum(state * wave[1]), (y, state)

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arguments)
    return {"output": outputs[0], "final_state": outputs[1], **gradients}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("W", [1, 4])
def test_matches_a_numpy_loop(implementation, W):
    with jax.enable_x64(True):
        arguments = example(0, *ROWS.shape, 3, W, jnp.float64)
        outputs = causal_conv(**arguments, segment_ids=ROWS, implementation=implementation)
        errors = tree_errors(outputs, numpy_loop(**arguments, segment_ids=ROWS))
    assert max(errors.values()) < 1e-14, errors


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [ROWS, CONTIGUOUS, None], ids=["gaps", "contiguous", "one document"])
def test_xla_matches_reference_in_float64(rows, activation):
    with jax.enable_x64(True):
        arguments = example(1, *(ROWS if rows is None else rows).shape, 3, 4, jnp.float64)
        out = value_and_gradients(arguments, rows, "xla", activation)
        errors = tree_errors(out, value_and_gradients(arguments, rows, "reference", activation))
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_precision(implementation, dtype, bound):
    """float32: a few sums of rounded products, 1e-7 each. bfloat16: its own rounding of output and gradients, 2^-9 each."""
    arguments = example(2, *ROWS.shape, 3, 4, dtype)
    out = value_and_gradients(arguments, ROWS, implementation)
    assert {name: a.dtype for name, a in out.items()} == {
        "output": dtype, "final_state": jnp.float32, "x": dtype, "weight": dtype, "initial_state": dtype
    }  # fmt: skip
    with jax.enable_x64(True):
        exact = value_and_gradients({name: a.astype(jnp.float64) for name, a in arguments.items()}, ROWS, "reference")
        errors = tree_errors(out, exact)
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_rows_shorter_than_the_taps(implementation, T):
    with jax.enable_x64(True):
        arguments = example(3, 2, T, 3, 4, jnp.float64)
        whole = jnp.ones((2, T), jnp.int32)
        padded = whole.at[0, 0].set(0)
        run = jax.jit(partial(causal_conv, implementation=implementation))
        errors = [
            tree_errors(run(**arguments), numpy_loop(**arguments, segment_ids=whole)),
            tree_errors(run(**arguments, segment_ids=padded), numpy_loop(**arguments, segment_ids=padded)),
        ]
    assert max(max(e.values()) for e in errors) < 1e-14, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_documents(implementation):
    rng = np.random.default_rng(4)
    run = jax.jit(partial(causal_conv, implementation=implementation))
    with jax.enable_x64(True):
        for seed in range(8):
            segment_ids = random_segment_ids(rng, 3, 40, mean_length=rng.choice([1.5, 4.0, 20.0]), padding=rng.choice([0.0, 0.4]))
            arguments = example(seed, 3, 40, 2, 4, jnp.float64)
            errors = tree_errors(run(**arguments, segment_ids=segment_ids), numpy_loop(**arguments, segment_ids=segment_ids))
            assert max(errors.values()) < 1e-14, (errors, segment_ids)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_leaks_nothing(implementation):
    arguments = example(5, *ROWS.shape, 3, 4)
    clean = value_and_gradients(arguments, ROWS, implementation)
    padding = (ROWS == 0)[:, :, None]
    dirty = value_and_gradients(arguments | {"x": jnp.where(padding, jnp.nan, arguments["x"])}, ROWS, implementation)
    assert max(tree_errors(dirty, clean).values()) == 0.0
    assert not np.any(np.where(padding, dirty["output"], 0)) and not np.any(np.where(padding, dirty["x"], 0))


def test_padding_inside_a_document_changes_nothing():
    arguments = example(6, 1, 6, 3, 4)
    run = jax.jit(causal_conv)
    y, state = run(**arguments)
    at = jnp.asarray([1, 2, 5, 6, 8, 11])
    spread = arguments | {"x": jnp.full((1, 13, 3), jnp.inf).at[:, at].set(arguments["x"])}
    segment_ids = jnp.zeros((1, 13), jnp.int32).at[:, at].set(7)
    spread_y, spread_state = run(**spread, segment_ids=segment_ids)
    assert max(tree_errors((spread_y[:, at], spread_state), (y, state)).values()) < 1e-6  # sums fused differently


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_split_with_the_state_passed_on_is_the_whole(implementation):
    arguments = example(7, *ROWS.shape, 3, 4)
    run = jax.jit(partial(causal_conv, implementation=implementation))
    whole = run(**arguments, segment_ids=ROWS)
    x, state = arguments["x"], arguments["initial_state"]
    pieces = []
    for piece in (slice(0, 4), slice(4, 5), slice(5, 13)):
        # The state handed over belongs to the document before the cut: a row in which another one follows starts from zeros.
        sides = [([i for i in row[: piece.start] if i], [i for i in row[piece.start :] if i]) for row in ROWS.tolist()]
        goes_on = [not before or not after or before[-1] == after[0] for before, after in sides]
        state = jnp.where(jnp.asarray(goes_on)[:, None, None], state, 0)
        y, state = run(x[:, piece], arguments["weight"], initial_state=state, segment_ids=ROWS[:, piece])
        pieces.append(y)
    assert max(tree_errors((jnp.concatenate(pieces, 1), state), whole).values()) < 1e-6


@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_are_the_sequence(activation):
    arguments = example(8, 2, 9, 3, 4)
    y, final_state = causal_conv(**arguments, activation=activation)
    state, outputs = arguments["initial_state"], []
    for t in range(9):
        out, state = causal_conv_step(arguments["x"][:, t], arguments["weight"], state, activation=activation)
        outputs.append(out)
    assert max(tree_errors((jnp.stack(outputs, 1), state), (y, final_state)).values()) < 1e-6


def test_under_vmap_and_checkpoint():
    arguments = example(9, *ROWS.shape, 3, 4)
    plain = value_and_gradients(arguments, ROWS, "xla")

    def one_row(x, initial_state, segment_ids):
        run = jax.checkpoint(jax.checkpoint(partial(causal_conv, activation="silu")))
        y, state = run(x[None], arguments["weight"], initial_state=initial_state[None], segment_ids=segment_ids[None])
        return y[0], state[0]

    @jax.jit
    def by_rows(x, state):
        outputs, pull = jax.vjp(lambda x, state: jax.vmap(one_row)(x, state, ROWS), x, state)
        waves = [jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape) for a in outputs]
        return *outputs, *pull(tuple(waves))

    out = by_rows(arguments["x"], arguments["initial_state"])
    errors = tree_errors(out, tuple(plain[name] for name in ("output", "final_state", "x", "initial_state")))
    assert max(errors.values()) < 1e-6, errors


def test_compiles_for_tpu():
    shapes = jax.eval_shape(lambda: example(10, 2, 16, 8, 4))
    lowered = jax.export.export(jax.jit(value_and_gradients, static_argnums=2), platforms=["tpu"])(
        shapes, jax.ShapeDtypeStruct((2, 16), jnp.int32), "xla"
    )
    assert lowered.platforms == ("tpu",)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((2, 5))}, r"x has shape \(2, 5\), needs 3 axes \[B,T,D\]"),
        ({"x": jnp.zeros((2, 5, 3), jnp.int32)}, "x has dtype int32, needs a floating-point"),
        ({"weight": jnp.zeros((4, 4))}, r"weight has shape \(4, 4\), needs \[D,W\] with D=3 \(from x\)"),
        ({"weight": jnp.zeros((3, 0))}, "at least one tap"),
        ({"initial_state": jnp.zeros((2, 4, 3))}, r"initial_state has shape \(2, 4, 3\), needs \(2, 3, 3\)"),
        ({"segment_ids": jnp.zeros((2, 4), jnp.int32)}, r"segment_ids has shape \(2, 4\), needs \[B,T\] with T=5"),
        ({"segment_ids": jnp.zeros((2, 5))}, "segment_ids has dtype float32, needs integers"),
        ({"activation": "relu"}, "no activation 'relu'"),
        ({"implementation": "cudnn"}, "no implementation 'cudnn'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv(**(example(11, 2, 5, 3, 4) | change))
