"""The elementwise recurrence against a numpy loop, its implementations against the reference, and its contract."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear_scan import linear_scan, linear_scan_step, shapes, xla
from pallas_kernels.linear_scan.api import IMPLEMENTATIONS
from tests.helpers import random_segment_ids, tree_errors

OTHERS = sorted(set(IMPLEMENTATIONS) - {"reference"})
IN_FLOAT64 = sorted(set(IMPLEMENTATIONS) - {"pallas"})  # kernels compute in float32
# One document; several, an id used again; padding left, right, between and inside; nothing but padding; documents of one token.
ROWS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [3, 3, 3, 3, 1, 1, 1, 1, 1, 3, 3, 3, 3],
        [0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0],
        [0, 5, 0, 5, 5, 0, 0, 0, 5, 0, 4, 0, 4],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 2, 3, 1, 2, 2, 3, 3, 3, 1, 2, 1, 2],
    ]
)


def example(seed, B, T, D, segment_ids=None, dtype=np.float64):
    """Decays of 0, of 1, of exp(-50) and between, mixed at random, and nan wherever there is padding."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 5, (B, T, D))
    decay = np.choose(kind, [0.0, 1.0, np.exp(-50.0), 1 - 1e-3 * rng.random((B, T, D)), rng.random((B, T, D))])
    x = rng.normal(size=(B, T, D))
    if segment_ids is not None:
        decay[np.asarray(segment_ids) == 0] = np.nan
        x[np.asarray(segment_ids) == 0] = np.nan
    return {"decay": decay.astype(dtype), "x": x.astype(dtype), "initial_state": rng.normal(size=(B, D)).astype(dtype)}


def numpy_loop(decay, x, initial_state, segment_ids):
    h, state = np.zeros(x.shape), np.array(initial_state, np.float64)
    for b, row in enumerate(segment_ids):
        document = None
        for t, segment in enumerate(row):
            if segment == 0:
                continue
            before = 0 if document not in (None, segment) else state[b]
            document = segment
            state[b] = h[b, t] = np.asarray(decay[b, t], np.float64) * before + x[b, t]
    return h, state


@partial(jax.jit, static_argnames="implementation")
def value_and_gradients(arguments, segment_ids, implementation):
    """Outputs, and the gradients of a random-looking function of both."""

    def loss(arguments):
        h, state = linear_scan(**arguments, segment_ids=segment_ids, implementation=implementation)
        wave = [np.cos(np.arange(a.size)).reshape(a.shape).astype(state.dtype) for a in (h, state)]
        return jnp.sum(h.astype(state.dtype) * wave[0]) + jnp.sum(state * wave[1]), (h, state)

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arguments)
    return {"h": outputs[0], "final_state": outputs[1], **gradients}


def errors(arguments, segment_ids, implementation, dtype):
    """Of an implementation in ``dtype`` to the reference in float64, both from the very same inputs."""
    with jax.enable_x64(True):
        given = jax.tree.map(lambda x: jnp.asarray(x, dtype), arguments)
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), given)
        reference = value_and_gradients(exact, segment_ids, "reference")
        return tree_errors(value_and_gradients(given, segment_ids, implementation), reference)


@pytest.mark.parametrize("implementation", IN_FLOAT64)
def test_matches_a_numpy_loop(implementation):
    arguments = example(0, *ROWS.shape, 3, ROWS)
    with jax.enable_x64(True):
        outputs = linear_scan(**arguments, segment_ids=ROWS, implementation=implementation)
        found = tree_errors(outputs, numpy_loop(**arguments, segment_ids=ROWS))
    assert max(found.values()) < 1e-14, found


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("T", [1, pytest.param(2, marks=pytest.mark.slow), 50])
def test_matches_the_reference(implementation, T):
    rng = np.random.default_rng(T)
    for segment_ids in (None, random_segment_ids(rng, 2, T)):
        arguments = example(T, 2, T, 3, segment_ids)
        if implementation in IN_FLOAT64:
            found = errors(arguments, segment_ids, implementation, jnp.float64)
            assert max(found.values()) < 1e-13, found
        # A few roundings of 2^-24 a token, none of them amplified: decays are at most 1.
        found = errors(arguments, segment_ids, implementation, jnp.float32)
        assert max(found.values()) < 1e-6, found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1, 30), st.floats(0, 0.9))
def test_any_documents(seed, mean_length, padding):
    segment_ids = random_segment_ids(np.random.default_rng(seed), 2, 50, mean_length, padding)
    arguments = example(seed, 2, 50, 3, segment_ids)
    for implementation in set(OTHERS) & set(IN_FLOAT64):
        found = errors(arguments, segment_ids, implementation, jnp.float64)
        assert max(found.values()) < 1e-13, found


@pytest.mark.parametrize("T", [1, 2, 3, 31, 64, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_orders_for_accelerators_and_cpu_agree(T, reverse):
    with jax.enable_x64(True):
        arguments = example(T, 2, T, 4)
        arrays = [jnp.asarray(arguments[name]) for name in ("decay", "x", "initial_state")]
        found = tree_errors(xla.side_by_side(*arrays, reverse), xla.one_by_one(*arrays, reverse))
    assert found[""] < 1e-14


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation, record_property):
    arguments = shapes.inputs(shapes.SHAPES["tiny"], jax.random.key(0), jnp.bfloat16)
    found = errors(arguments, None, implementation, jnp.bfloat16)
    record_property("errors", found)
    # The sums are float32: what is left is one rounding of each result to bfloat16, 2^-9 at most.
    assert max(found.values()) < 2**-8, found


def test_dtypes():
    arguments = shapes.inputs(shapes.SHAPES["tiny"], jax.random.key(0), jnp.bfloat16)
    h, state = linear_scan(**arguments)
    assert (h.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    h, state = linear_scan_step(arguments["decay"][:, 0], arguments["x"][:, 0], arguments["initial_state"])
    assert (h.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("implementation", IN_FLOAT64)
def test_a_sequence_in_two_parts_and_token_by_token(implementation):
    with jax.enable_x64(True):
        arguments = example(3, 2, 40, 4)
        decay, x, state = (jnp.asarray(arguments[name]) for name in ("decay", "x", "initial_state"))
        run = jax.jit(partial(linear_scan, implementation=implementation))
        whole = run(decay, x, initial_state=state)
        first, middle = run(decay[:, :17], x[:, :17], initial_state=state)
        second, last = run(decay[:, 17:], x[:, 17:], initial_state=middle)
        assert max(tree_errors((jnp.concatenate([first, second], axis=1), last), whole).values()) < 1e-14
        tokens = []
        for t in range(40):
            h, state = linear_scan_step(decay[:, t], x[:, t], state)
            tokens.append(h)
        assert max(tree_errors((jnp.stack(tokens, axis=1), state), whole).values()) < 1e-14


@pytest.mark.parametrize("implementation", [pytest.param("pallas", marks=pytest.mark.slow), *(name for name in OTHERS if name != "pallas")])
def test_under_transformations(implementation):
    segment_ids = jnp.asarray(ROWS)
    arguments = example(4, *ROWS.shape, 3, ROWS, np.float32)

    def run(arguments, segment_ids):
        h, state = linear_scan(**arguments, segment_ids=segment_ids, implementation=implementation)
        return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.cos(state))

    gradients = jax.jit(jax.grad(run))(arguments, segment_ids)
    remat = jax.jit(jax.grad(jax.checkpoint(jax.checkpoint(run))))(arguments, segment_ids)
    assert max(tree_errors(remat, gradients).values()) < 1e-6

    del arguments["initial_state"]  # zeros made inside have to fit in with vmap and shard_map too
    gradients = jax.jit(jax.grad(run))(arguments, segment_ids)
    rows = jax.tree.map(lambda x: x[:, None], (arguments, segment_ids))
    mapped = jax.tree.map(lambda x: x[:, 0], jax.jit(jax.vmap(jax.grad(run)))(*rows))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    # JAX's interpreter of kernels does not keep track of what varies over a mesh.
    check = implementation != "pallas"
    sharded = jax.shard_map(jax.grad(run), mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=check)
    sharded = jax.jit(sharded)(arguments, segment_ids)
    for other in (mapped, sharded):
        assert max(tree_errors(other, gradients).values()) < 1e-6


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_lowers_for_any_platform(platform):
    arguments = shapes.inputs(shapes.SHAPES["tiny"], jax.random.key(0))
    exported = jax.export.export(value_and_gradients, platforms=[platform])(arguments, None, implementation=None)
    text = exported.mlir_module()
    # Which order runs is decided here and not by the local device: a CPU takes the T tokens in turn, others blocks of them.
    T = shapes.SHAPES["tiny"].T
    assert (f"dense<{T}> : tensor<i32>" in text) == (platform == "cpu")


X = jax.ShapeDtypeStruct((2, 5, 3), jnp.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"decay": jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)}, "decay has shape (2, 5, 4), needs [B,T,D] with D=3"),
        ({"x": jax.ShapeDtypeStruct((2, 5), jnp.float32)}, "x has shape (2, 5), needs 3 axes"),
        ({"x": jax.ShapeDtypeStruct((2, 5, 3), jnp.int32)}, "x has dtype int32, needs a floating-point dtype"),
        ({"initial_state": jax.ShapeDtypeStruct((2, 4), jnp.float32)}, "initial_state has shape (2, 4), needs [B,D]"),
        ({"segment_ids": jax.ShapeDtypeStruct((2, 6), jnp.int32)}, "segment_ids has shape (2, 6), needs [B,T]"),
        ({"segment_ids": jax.ShapeDtypeStruct((2, 5), jnp.float32)}, "segment_ids has dtype float32, needs integers"),
        ({name: jax.ShapeDtypeStruct((2, 0, 3), jnp.float32) for name in ("x", "decay")}, "needs T >= 1"),
        ({"implementation": "flash"}, "no implementation 'flash'; choose one of"),
    ],
)
def test_refuses(change, message):
    arguments = {"decay": X, "x": X, **change}
    implementation = arguments.pop("implementation", None)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(partial(linear_scan, implementation=implementation), **arguments)
    assert "linear_scan" in str(error.value) and message in str(error.value)
