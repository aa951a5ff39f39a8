"""Gated linear attention against a numpy loop, its implementations against the reference, and its contract."""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step, shapes
from pallas_kernels.gated_linear_attention.api import IMPLEMENTATIONS
from tests.helpers import random_segment_ids, tree_errors

IN_FLOAT64 = sorted(set(IMPLEMENTATIONS) - {"pallas"})  # kernels compute in float32; they have a file of their own
OTHERS = sorted(set(IN_FLOAT64) - {"reference"})
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


class Case(NamedTuple):
    """Sizes, the axes of log_decay ("fixed", "head" or "channel"), its values, and whether rows hold several documents and padding."""

    T: int
    axes: str
    decays: str = "mixed"
    documents: bool = False
    B: int = 2
    H: int = 2
    HV: int = 4
    K: int = 8
    V: int = 12


CASES = [
    Case(1, "head"),
    Case(1, "channel", documents=True),
    Case(70, "fixed", documents=True),
    Case(70, "head", documents=True),
    Case(70, "channel", documents=True),
    Case(128, "fixed", "weak"),  # whole blocks of one document: the decays of a chunk are computed once
    Case(150, "head", "strong"),
    Case(150, "head", "none"),
    Case(150, "channel", documents=True),
    Case(150, "channel", "strong"),
    Case(150, "channel", "none"),
    Case(150, "channel", "mixed", HV=2, K=16, V=4),
]


def example(seed, case, segment_ids=None):
    """float64 arguments; "mixed" decays are 0, -50 and anything between at random, "medium" ones those at which the Hopper kernels take
    another way in half of the channels; padding holds nan."""
    rng = np.random.default_rng(seed)
    B, T, H, HV, K, V = case.B, case.T, case.H, case.HV, case.K, case.V
    axes = {"fixed": (HV,), "head": (B, T, HV), "channel": (B, T, HV, K)}[case.axes]
    weak, medium = -1e-3 * rng.random(axes), -rng.exponential(size=axes)
    decays = {
        "none": np.zeros(axes),
        "weak": weak,
        "medium": np.where(np.arange(axes[-1]) < axes[-1] // 2, -1.25, -1.5) + weak,  # 2^-58 and 2^-69 in 32 tokens
        "strong": np.full(axes, -50.0) + weak,
        "mixed": np.choose(rng.integers(0, 4, axes), [np.zeros(axes), np.full(axes, -50.0), weak, medium]),
    }
    arguments = {
        "q": rng.normal(size=(B, T, H, K)),
        "k": rng.normal(size=(B, T, H, K)),
        "v": rng.normal(size=(B, T, HV, V)),
        "log_decay": decays[case.decays],
        "initial_state": rng.normal(size=(B, HV, K, V)),
    }
    if segment_ids is not None:
        for name, array in arguments.items():
            if name != "initial_state" and array.ndim > 1:
                array[np.asarray(segment_ids) == 0] = np.nan
    return arguments


def documents(seed, case):
    return random_segment_ids(np.random.default_rng(seed), case.B, case.T) if case.documents else None


def numpy_loop(q, k, v, log_decay, initial_state, segment_ids):
    """The definition, head by head and token by token."""
    (B, T, H, K), HV = q.shape, v.shape[2]
    per_token = log_decay if log_decay.ndim > 1 else np.broadcast_to(log_decay, (B, T, HV))
    o, states = np.zeros(v.shape), np.array(initial_state)
    for b in range(B):
        for h in range(HV):
            document, state = None, states[b, h]
            for t in range(T):
                if segment_ids[b, t] == 0:
                    continue
                if document is not None and segment_ids[b, t] != document:
                    state = np.zeros_like(state)
                document = segment_ids[b, t]
                head = h // (HV // H)
                decay = np.exp(per_token[b, t, h]) * np.ones(K)
                state = np.diag(decay) @ state + np.outer(k[b, t, head], v[b, t, h])
                o[b, t, h] = K**-0.5 * state.T @ q[b, t, head]
            states[b, h] = state
    return o, states


@partial(jax.jit, static_argnames=("implementation", "scale"))
def value_and_gradients(arguments, segment_ids, implementation, scale=None):
    """Outputs, and the gradients of a random-looking function of both."""

    def loss(arguments):
        o, state = gated_linear_attention(**arguments, segment_ids=segment_ids, implementation=implementation, scale=scale)
        wave = [np.cos(np.arange(a.size)).reshape(a.shape).astype(state.dtype) for a in (o, state)]
        return jnp.sum(o.astype(state.dtype) * wave[0]) + jnp.sum(state * wave[1]), (o, state)

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arguments)
    return {"o": outputs[0], "final_state": outputs[1], **gradients}


def errors(arguments, segment_ids, implementation, dtype, state_dtype=None):
    """Of an implementation in ``dtype`` to the reference in float64, both from the very same inputs."""
    with jax.enable_x64(True):
        given = {name: jnp.asarray(x, dtype if name in ("q", "k", "v") else state_dtype or dtype) for name, x in arguments.items()}
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), given)
        reference = value_and_gradients(exact, segment_ids, "reference")
        return tree_errors(value_and_gradients(given, segment_ids, implementation), reference)


@pytest.mark.parametrize("axes", ["fixed", "head", "channel"])
@pytest.mark.parametrize("implementation", IN_FLOAT64)
def test_matches_a_numpy_loop(implementation, axes):
    case = Case(ROWS.shape[1], axes, B=ROWS.shape[0], K=3, V=2)
    arguments = example(0, case, ROWS)
    with jax.enable_x64(True):
        run = jax.jit(partial(gated_linear_attention, implementation=implementation))
        found = tree_errors(run(**arguments, segment_ids=ROWS), numpy_loop(**arguments, segment_ids=ROWS))
    assert max(found.values()) < 1e-14, found


def named(case):
    return "-".join(map(str, case[:4]))


@pytest.mark.parametrize(
    "case, implementation",
    [(case, "xla") for case in CASES] + [(case, "associative_scan") for case in CASES if case.documents],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
def test_matches_the_reference_in_float64(case, implementation):
    segment_ids = documents(1, case)
    found = errors(example(1, case, segment_ids), segment_ids, implementation, jnp.float64)
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("case", CASES, ids=named)
def test_float32_is_as_exact_for_any_decay(case):
    segment_ids = documents(2, case)
    found = errors(example(2, case, segment_ids), segment_ids, "xla", jnp.float32)
    # Roundings of 2^-24 in sums of up to some hundred terms give about 1e-7, for decays of any strength and for gradients by them.
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("axes", ["fixed", "head", "channel"])
@pytest.mark.parametrize("implementation", sorted(set(IMPLEMENTATIONS) - {"reference"}))
def test_a_log_decay_of_minus_infinity_forgets(implementation, axes):
    """Here and there, at a chunk's first token and its last, and with none after: values and gradients are those of the reference."""
    case = Case(70, axes, documents=True)  # as large as another
    segment_ids = documents(5, case)
    arguments = example(5, case, segment_ids)
    forgets = np.random.default_rng(5).random(arguments["log_decay"].shape) < 0.15
    if axes == "fixed":
        forgets[0] = True
    else:
        forgets[0, [0, 31, 32, 63, 64, 69]] = True
    arguments["log_decay"][forgets] = -np.inf
    for dtype, bound in ((jnp.float64, 1e-12), (jnp.float32, 1e-6)):
        if implementation != "pallas" or dtype == jnp.float32:
            found = errors(arguments, segment_ids, implementation, dtype)
            assert max(found.values()) < bound, found  # nan is not below it


CASE = Case(70, "channel", documents=True)  # as large as another case: compiled once for both


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1, 60), st.floats(0, 0.9), st.sampled_from(["head", "channel"]))
def test_any_documents(seed, mean_length, padding, axes):
    case = CASE._replace(axes=axes)
    segment_ids = random_segment_ids(np.random.default_rng(seed), case.B, case.T, mean_length, padding)
    for implementation in OTHERS:
        found = errors(example(seed, case, segment_ids), segment_ids, implementation, jnp.float64)
        assert max(found.values()) < 1e-12, found


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shapes(data):
    H = data.draw(st.integers(1, 3))
    sizes = {"T": data.draw(st.integers(1, 300)), "B": data.draw(st.integers(1, 2)), "H": H, "HV": H * data.draw(st.integers(1, 3))}
    sizes |= {"K": data.draw(st.integers(1, 20)), "V": data.draw(st.integers(1, 20)), "documents": data.draw(st.booleans())}
    case = Case(axes=data.draw(st.sampled_from(["fixed", "head", "channel"])), **sizes)
    segment_ids = documents(3, case)
    for implementation in OTHERS:
        found = errors(example(3, case, segment_ids), segment_ids, implementation, jnp.float64)
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("axes", ["fixed", "channel"])
def test_bfloat16(axes, record_property):
    arguments = shapes.inputs(shapes.SHAPES[f"tiny_{axes}"], jax.random.key(0), jnp.bfloat16)
    found = errors(arguments, None, "xla", jnp.bfloat16, state_dtype=jnp.float32)
    record_property("errors", found)
    # All is computed in float32 inside: what is left is one rounding of each result to bfloat16, 2^-9 at most.
    assert max(found.values()) < 2**-8, found


def test_dtypes_and_scale():
    arguments = shapes.inputs(shapes.SHAPES["tiny_head"], jax.random.key(0), jnp.bfloat16)
    o, state = gated_linear_attention(**arguments)
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    state = arguments.pop("initial_state")
    o, state = gated_linear_attention_step(*(x[:, 0] for x in arguments.values()), state)
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    arguments = example(0, Case(5, "head"))
    with jax.enable_x64(True):
        K = arguments["q"].shape[-1]
        default, state = gated_linear_attention(**arguments)
        for implementation in IN_FLOAT64:
            run = jax.jit(partial(gated_linear_attention, scale=2 * K**-0.5, implementation=implementation))
            assert max(tree_errors(run(**arguments), (2 * default, state)).values()) < 1e-14


@pytest.mark.parametrize("axes", ["fixed", "head", "channel"])
def test_a_sequence_in_two_parts_and_token_by_token(axes):
    with jax.enable_x64(True):
        arguments = {name: jnp.asarray(x) for name, x in example(3, Case(40, axes)).items()}
        state = arguments.pop("initial_state")

        def part(tokens):
            return {name: x[:, tokens] if x.ndim > 1 else x for name, x in arguments.items()}

        run = jax.jit(gated_linear_attention)
        whole = run(**arguments, initial_state=state)
        first, middle = run(**part(slice(0, 17)), initial_state=state)
        second, last = run(**part(slice(17, 40)), initial_state=middle)
        assert max(tree_errors((jnp.concatenate([first, second], axis=1), last), whole).values()) < 1e-13
        step, tokens = jax.jit(gated_linear_attention_step), []
        for t in range(40):
            o, state = step(**part(t), state=state)
            tokens.append(o)
        assert max(tree_errors((jnp.stack(tokens, axis=1), state), whole).values()) < 1e-13


@pytest.mark.parametrize("implementation, axes", [("xla", "channel"), pytest.param("associative_scan", "head", marks=pytest.mark.slow)])
def test_under_transformations(implementation, axes):
    case = CASE._replace(axes=axes)
    segment_ids = documents(4, case)
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(4, case, segment_ids).items()}

    def run(arguments, segment_ids):
        o, state = gated_linear_attention(**arguments, segment_ids=segment_ids, implementation=implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state))

    gradients = jax.jit(jax.grad(run))(arguments, segment_ids)
    remat = jax.jit(jax.grad(jax.checkpoint(jax.checkpoint(run))))(arguments, segment_ids)
    assert max(tree_errors(remat, gradients).values()) < 1e-6

    del arguments["initial_state"]  # zeros made inside have to fit in with vmap and shard_map too
    gradients = jax.jit(jax.grad(run))(arguments, segment_ids)
    rows = jax.tree.map(lambda x: x[:, None], (arguments, segment_ids))
    mapped = jax.tree.map(lambda x: x[:, 0], jax.jit(jax.vmap(jax.grad(run)))(*rows))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(jax.grad(run), mesh=mesh, in_specs=(spec, spec), out_specs=spec))(arguments, segment_ids)
    for other in (mapped, sharded):
        assert max(tree_errors(other, gradients).values()) < 1e-6


@pytest.mark.parametrize("axes", ["head", "channel"])
def test_keeps_no_state_for_each_token(axes):
    B, T, H, K, V = 1, 4096, 2, 64, 64
    shape = shapes.Shape(B, T, H, K, V, axes)
    arguments = jax.eval_shape(partial(shapes.inputs, shape), jax.random.key(0))
    states = 4 * B * T * H * K * V
    scratch = {
        implementation: value_and_gradients.lower(arguments, None, implementation).compile().memory_analysis().temp_size_in_bytes
        for implementation in ("reference", *OTHERS)
    }
    assert scratch["reference"] > states
    assert scratch["xla"] < states / 10, scratch
    assert scratch["associative_scan"] < states, scratch


@pytest.mark.parametrize("axes", ["fixed", "channel"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform, axes):
    arguments = shapes.inputs(shapes.SHAPES[f"tiny_{axes}"], jax.random.key(0), jnp.bfloat16)
    exported = jax.export.export(value_and_gradients, platforms=[platform])(arguments, None, implementation=None)
    assert exported.platforms == (platform,)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


GOOD = {"q": array(2, 5, 2, 3), "k": array(2, 5, 2, 3), "v": array(2, 5, 4, 6), "log_decay": array(2, 5, 4)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": array(2, 5, 2, 4)}, "k has shape (2, 5, 2, 4), needs [B,T,H,K] with K=3"),
        ({"q": array(2, 5, 6)}, "q has shape (2, 5, 6), needs 4 axes"),
        ({"v": array(2, 5, 3, 6), "log_decay": array(3)}, "v has 3 heads, needs a multiple of the 2 heads"),
        ({"log_decay": array(2, 5, 2)}, "log_decay has shape (2, 5, 2), needs [B,T,HV] with HV=4"),
        ({"log_decay": array(2, 5, 4, 6)}, "log_decay has shape (2, 5, 4, 6), needs [B,T,HV,K] with K=3"),
        ({"log_decay": array(5, 4)}, "log_decay has shape (5, 4), needs [B,T,HV,K] or [B,T,HV] or [HV]"),
        ({"log_decay": array(4, dtype=jnp.int32)}, "log_decay has dtype int32, needs a floating-point dtype"),
        ({"initial_state": array(2, 2, 3, 6)}, "initial_state has shape (2, 2, 3, 6), needs [B,HV,K,V] with HV=4"),
        ({"segment_ids": array(2, 6, dtype=jnp.int32)}, "segment_ids has shape (2, 6), needs [B,T]"),
        ({"segment_ids": array(2, 5)}, "segment_ids has dtype float32, needs integers"),
        ({"q": array(2, 0, 2, 3), "k": array(2, 0, 2, 3), "v": array(2, 0, 4, 6), "log_decay": array(4)}, "needs T >= 1"),
        ({"implementation": "fastest"}, "no implementation 'fastest'; choose one of"),
    ],
)
def test_refuses(change, message):
    arguments = {**GOOD, **change}
    implementation = arguments.pop("implementation", None)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(partial(gated_linear_attention, implementation=implementation), **arguments)
    assert "gated_linear_attention" in str(error.value) and message in str(error.value)


def test_step_refuses():
    token = {"q": array(2, 2, 3), "k": array(2, 2, 3), "v": array(2, 4, 6), "log_decay": array(2, 4), "state": array(2, 4, 3, 6)}
    assert jax.eval_shape(gated_linear_attention_step, **token)[0].shape == (2, 4, 6)
    for name, wrong in {"k": array(2, 2, 4), "log_decay": array(2, 5, 4, 3), "state": array(2, 2, 3, 6), "v": array(2, 3, 6)}.items():
        with pytest.raises(ValueError, match=name):
            jax.eval_shape(gated_linear_attention_step, **{**token, name: wrong})


def test_lists_are_refused():
    x = np.ones((1, 2, 1, 3), np.float32)
    with pytest.raises(ValueError, match="gated_linear_attention: q is a list, needs an array"):
        gated_linear_attention(x.tolist(), x, x, x)
    with pytest.raises(ValueError, match="gated_linear_attention: log_decay is a float, needs an array"):
        gated_linear_attention(x, x, x, -0.1)
