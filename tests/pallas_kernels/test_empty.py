"""No rows and no tokens, for every operator: of no rows an empty result and gradients, in every implementation; no tokens are refused."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.cases import OPERATORS, api

# (operator, named shape, implementation)
CASES = [
    (operator, name, implementation)
    for operator in OPERATORS
    for name in importlib.import_module(f"pallas_kernels.{operator}.shapes").SHAPES
    if name.startswith("tiny")
    for implementation in (*api(operator).IMPLEMENTATIONS, None)
]


def example(operator, name, dtype, **sizes):
    """The operator, its floating-point arguments of this shape but for ``sizes``, and segment ids to match."""
    shapes = importlib.import_module(f"pallas_kernels.{operator}.shapes")
    shape = dataclasses.replace(shapes.SHAPES[name], **sizes)
    return getattr(api(operator), operator), shapes.inputs(shape, jax.random.key(0), dtype), jnp.ones((shape.B, shape.T), jnp.int32)


def like_the_reference(shape_of_one):
    """Of a result for one row, that for none."""
    return jax.ShapeDtypeStruct((0, *shape_of_one.shape[1:]), shape_of_one.dtype)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("operator, name, implementation", CASES)
def test_no_rows_are_no_work(operator, name, implementation, with_ids):
    run, arguments, ids = example(operator, name, jnp.bfloat16, B=0)
    _, one, its_ids = example(operator, name, jnp.bfloat16, B=1)

    def whole(arguments, ids, implementation):
        return run(**arguments, segment_ids=ids if with_ids else None, implementation=implementation)

    expected = jax.tree.map(like_the_reference, jax.eval_shape(lambda *given: whole(*given, "reference"), one, its_ids))
    outputs, pull = jax.vjp(lambda arguments: whole(arguments, ids, implementation), arguments)
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), outputs) == expected
    (gradients,) = pull(outputs)
    for key, gradient in gradients.items():  # one that all rows share, such as weight, has one of zeros
        assert (gradient.shape, gradient.dtype) == (arguments[key].shape, arguments[key].dtype) and not jnp.any(gradient)
    without = {key: value for key, value in arguments.items() if key != "initial_state"}
    found = jax.eval_shape(lambda arguments: whole(arguments, ids, implementation), without)
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), found) == expected


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_rows_in_float64(operator):
    with jax.enable_x64(True):
        run, arguments, _ = example(operator, next(name for o, name, _ in CASES if o == operator), jnp.float64, B=0)
        assert all(a.dtype == jnp.float64 for a in jax.tree.leaves(run(**arguments)))


@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("operator, name, implementation", CASES)
def test_no_tokens_are_refused(operator, name, implementation, B):
    run, arguments, ids = example(operator, name, jnp.float32, B=B, T=0)
    for given in (None, ids):
        with pytest.raises(ValueError, match=rf"^{operator}: [qx] has shape \({B}, 0, .*\), needs T >= 1$"):
            run(**arguments, segment_ids=given, implementation=implementation)
