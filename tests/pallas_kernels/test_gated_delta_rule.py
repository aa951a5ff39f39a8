"""The gated delta rule against a numpy loop, its implementations against the reference, and its contract."""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step, shapes, triangular
from pallas_kernels.gated_delta_rule.api import IMPLEMENTATIONS
from tests.helpers import random_segment_ids, relative_error, tree_errors

OTHERS = sorted(set(IMPLEMENTATIONS) - {"reference", "pallas"})  # kernels compute in float32; they have a file of their own
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
    """Sizes, the axes of log_decay ("none", "fixed", "head" or "channel"), its values, and whether rows hold documents and padding."""

    T: int
    axes: str
    decays: str = "mixed"
    documents: bool = False
    B: int = 2
    H: int = 2
    HV: int = 4
    K: int = 16
    V: int = 24
    keys: str = "unit"  # or "long" (|k| is not 1) or "same" (one key over and over)


CASES = [  # the compiled programs are shared by cases of one shape
    Case(1, "fixed"),
    pytest.param(Case(40, "none", documents=True, keys="long"), marks=pytest.mark.slow),
    Case(150, "none", HV=2, keys="same"),
    pytest.param(Case(128, "head", "mixed", K=24, V=8), marks=pytest.mark.slow),
    Case(150, "head", "mixed", documents=True),
    Case(150, "head", "strong", documents=True),
    Case(150, "channel", "mixed", documents=True),
    Case(150, "channel", "strong", documents=True),
    Case(150, "channel", "zero", documents=True),
]


def example(seed, case, segment_ids=None):
    """float64 arguments, exact in float32 too; "mixed" decays are 0, -50 and anything between at random, "medium" ones those at which the
    Hopper kernels take another way in half of the channels; padding holds nan and inf."""
    rng = np.random.default_rng(seed)
    B, T, H, HV, K, V = case.B, case.T, case.H, case.HV, case.K, case.V
    k = rng.normal(size=(B, T, H, K))
    if case.keys == "same":
        k[:] = rng.normal(size=(H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True) * (0.8 + 0.4 * rng.random((B, T, H, 1)) if case.keys == "long" else 1)
    arguments = {
        "q": rng.normal(size=(B, T, H, K)),
        "k": k,
        "v": rng.normal(size=(B, T, HV, V)),
        "beta": 2 * rng.random((B, T, HV)) * (0.6 if case.keys == "long" else 1),  # up to 2: eigenvalues down to -1
        "initial_state": rng.normal(size=(B, HV, K, V)),
    }
    if case.axes != "none":
        axes = {"fixed": (HV,), "head": (B, T, HV), "channel": (B, T, HV, K)}[case.axes]
        weak, medium = -1e-3 * rng.random(axes), -rng.exponential(size=axes)
        arguments["log_decay"] = {
            "zero": np.zeros(axes),
            "weak": weak,
            "medium": np.where(np.arange(axes[-1]) < axes[-1] // 2, -1.25, -1.5) + weak,  # 2^-58 and 2^-69 in 32 tokens
            "strong": np.full(axes, -50.0) + weak,
            "mixed": np.choose(rng.integers(0, 4, axes), [np.zeros(axes), np.full(axes, -50.0), weak, medium]),
        }[case.decays]
    arguments = {name: x.astype(np.float32).astype(np.float64) for name, x in arguments.items()}
    if segment_ids is not None:
        for name, array in arguments.items():
            if array.shape[:2] == (B, T):
                array[np.asarray(segment_ids) == 0] = np.nan if name != "v" else np.inf
    return arguments


def documents_of(case, seed=0):
    if not case.documents:
        return None
    ids = np.array(random_segment_ids(np.random.default_rng(seed), case.B, case.T, mean_length=25.0))
    ids[0, : case.T // 3] = 0 if case.T > 1 else 2
    return jnp.asarray(ids)


@partial(jax.jit, static_argnames="implementation")
def outputs_and_gradients(arguments, cotangents, segment_ids, implementation):
    def run(arguments):
        return gated_delta_rule(**arguments, segment_ids=segment_ids, implementation=implementation)

    (output, final_state), pull = jax.vjp(run, arguments)
    d_output, d_state = cotangents
    (gradients,) = pull((d_output.astype(output.dtype), d_state.astype(final_state.dtype)))
    return {"output": output, "final_state": final_state, **{f"d_{name}": x for name, x in gradients.items()}}


def evaluate(case, arguments, segment_ids, implementation, dtype):
    """Outputs, final state and all gradients, as numpy arrays; in float64 where dtype is."""
    rng = np.random.default_rng(7)
    cotangents = (
        rng.normal(size=(case.B, case.T, case.HV, case.V)).astype(np.float32),
        rng.normal(size=(case.B, case.HV, case.K, case.V)).astype(np.float32),
    )
    with jax.enable_x64(dtype == np.float64):
        arguments = {name: jnp.asarray(x, dtype if name in "qkv" or dtype != jnp.bfloat16 else np.float32) for name, x in arguments.items()}
        cotangents = jax.tree.map(partial(jnp.asarray, dtype=dtype), cotangents)
        results = outputs_and_gradients(arguments, cotangents, segment_ids, implementation)
        return jax.tree.map(np.asarray, results)


def loop(q, k, v, beta, initial_state, log_decay=None, segment_ids=None, scale=None):
    """The recurrence written out in numpy, a row, head and token at a time."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    output, final_state = np.zeros((B, T, HV, V)), initial_state.copy()
    for b in range(B):
        for h in range(HV):
            S, document = initial_state[b, h].copy(), None
            for t in range(T):
                if segment_ids is not None:
                    if segment_ids[b, t] == 0:
                        continue
                    if document is not None and segment_ids[b, t] != document:
                        S = np.zeros((K, V))
                    document = segment_ids[b, t]
                g = 0.0 if log_decay is None else log_decay[h] if log_decay.ndim == 1 else log_decay[b, t, h]
                key, query = k[b, t, h * H // HV], q[b, t, h * H // HV]
                S = np.diag(np.broadcast_to(np.exp(g), K)) @ S
                S = (np.eye(K) - beta[b, t, h] * np.outer(key, key)) @ S + beta[b, t, h] * np.outer(key, v[b, t, h])
                output[b, t, h] = (K**-0.5 if scale is None else scale) * S.T @ query
            final_state[b, h] = S
    return output, final_state


@pytest.mark.parametrize("axes", ["none", "fixed", "head", "channel"])
def test_reference_is_the_recurrence(axes):
    case = Case(ROWS.shape[1], axes, B=len(ROWS))
    arguments = example(0, case, ROWS)
    output, final_state = loop(**arguments, segment_ids=ROWS, scale=0.3)
    with jax.enable_x64(True):
        run = jax.jit(partial(gated_delta_rule, scale=0.3, implementation="reference"))
        found = run(**{name: jnp.asarray(x) for name, x in arguments.items()}, segment_ids=jnp.asarray(ROWS))
    assert relative_error(found[0], output) < 1e-13 and relative_error(found[1], final_state) < 1e-13
    assert np.all(np.asarray(found[0])[ROWS == 0] == 0)
    np.testing.assert_array_equal(found[1][4], arguments["initial_state"][4])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x) for x in case))
def test_implementations_match_the_reference(case):
    """float64: 1e-10, for nothing but the order of sums differs. float32: 1e-5, a hundred roundings; 1e-6 was measured."""
    ids = documents_of(case)
    arguments = example(1, case, ids)
    expected = evaluate(case, arguments, ids, "reference", np.float64)
    for implementation in OTHERS:
        for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
            found = evaluate(case, arguments, ids, implementation, dtype)
            errors = tree_errors(found, expected)
            assert max(errors.values()) < tolerance, (implementation, dtype, errors)
            if ids is not None:
                padding = np.asarray(ids) == 0
                assert all(not np.any(x[padding]) for x in found.values() if x.shape[:2] == padding.shape)


@pytest.mark.parametrize("axes", ["head", "channel"])
def test_bfloat16(axes, record_property):
    """bfloat16 q, k and v, each good to 2^-9, against float64 on the same rounded values: the outputs' own rounding is what is left."""
    case = Case(150, axes, "weak", documents=True)
    ids = documents_of(case)
    arguments = example(2, case, ids)
    for name in "qkv":
        arguments[name] = np.asarray(jnp.asarray(arguments[name], jnp.bfloat16), np.float64)
    expected = evaluate(case, arguments, ids, "reference", np.float64)
    for implementation in ("reference", "xla"):
        found = evaluate(case, arguments, ids, implementation, jnp.bfloat16)
        assert found["output"].dtype == jnp.bfloat16 and found["final_state"].dtype == np.float32
        errors = tree_errors(found, expected)
        record_property(implementation, errors)
        assert max(errors.values()) < 2**-8, errors
        assert errors["['final_state']"] < 1e-5, errors


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1.0, 60.0), st.floats(0.0, 0.6), st.sampled_from(["head", "channel"]))
def test_any_documents(seed, mean_length, padding, axes):
    case = Case(150, axes, documents=True)
    ids = random_segment_ids(np.random.default_rng(seed), case.B, case.T, mean_length, padding)
    arguments = example(seed, case, ids)
    expected = evaluate(case, arguments, ids, "reference", np.float64)
    assert max(tree_errors(evaluate(case, arguments, ids, "xla", np.float64), expected).values()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("implementation", OTHERS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_shape(implementation, data):
    H, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    case = Case(
        T=data.draw(st.integers(1, 200)),
        axes=data.draw(st.sampled_from(["none", "fixed", "head", "channel"])),
        documents=data.draw(st.booleans()),
        B=data.draw(st.integers(1, 3)),
        H=H,
        HV=H * groups,
        K=data.draw(st.integers(1, 40)),
        V=data.draw(st.integers(1, 40)),
    )
    ids = documents_of(case, seed=case.T)
    arguments = example(case.T, case, ids)
    expected = evaluate(case, arguments, ids, "reference", np.float64)
    errors = tree_errors(evaluate(case, arguments, ids, implementation, np.float64), expected)
    assert max(errors.values()) < 1e-10, (case, errors)


@pytest.mark.parametrize("implementation", OTHERS)
def test_a_sequence_in_two_parts_is_one_sequence(implementation):
    case = Case(150, "head", documents=True)
    ids = jnp.asarray(np.repeat([[1, 2], [3, 3]], [70, 80], axis=1).reshape(2, 150))
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(3, case).items()}
    state = arguments.pop("initial_state")
    run = jax.jit(partial(gated_delta_rule, implementation=implementation))
    output, final_state = run(**arguments, initial_state=state, segment_ids=ids)
    outputs, carried = [], state
    for part in (slice(0, 50), slice(50, None)):  # inside the first document of each row
        out, carried = run(**{name: x[:, part] for name, x in arguments.items()}, initial_state=carried, segment_ids=ids[:, part])
        outputs.append(out)
    assert relative_error(jnp.concatenate(outputs, axis=1), output) < 1e-5
    assert relative_error(carried, final_state) < 1e-5


@pytest.mark.parametrize("axes", ["none", "fixed", "head", "channel"])
def test_steps_are_the_sequence(axes):
    case = Case(12, axes)
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(4, case).items()}
    output, final_state = jax.jit(gated_delta_rule)(**arguments)
    state, g = arguments["initial_state"], arguments.get("log_decay")
    step = jax.jit(gated_delta_rule_step)
    for t in range(case.T):
        now = g if g is None or g.ndim == 1 else g[:, t]
        out, state = step(*(arguments[name][:, t] for name in ("q", "k", "v", "beta")), now, state)
        assert relative_error(out, output[:, t]) < 1e-5
    assert relative_error(state, final_state) < 1e-5


def test_defaults_and_dtypes():
    case = Case(20, "head")
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(5, case).items() if name != "initial_state"}
    arguments["v"] = arguments["v"].astype(jnp.bfloat16)
    explicit = {"scale": case.K**-0.5, "initial_state": jnp.zeros((2, 4, 16, 24)), "segment_ids": jnp.ones((2, 20), int)}
    expected = jax.jit(partial(gated_delta_rule, implementation="reference"))(**arguments, **explicit)
    for implementation in (None, "reference", *OTHERS):
        output, state = jax.jit(partial(gated_delta_rule, implementation=implementation))(**arguments)
        assert output.dtype == jnp.bfloat16 and state.dtype == jnp.float32
        assert relative_error(output, expected[0]) < 2**-8 and relative_error(state, expected[1]) < 1e-5


@pytest.mark.parametrize("implementation", [pytest.param("associative_scan", marks=pytest.mark.slow), "xla"])
def test_transformations(implementation):
    """vmap over a new axis, jax.checkpoint, and shard_map over batch and heads change nothing."""
    case = Case(70, "fixed", "weak")
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(6, case).items()}
    ids = jnp.asarray(random_segment_ids(np.random.default_rng(6), case.B, case.T, 30.0))
    names = list(arguments)

    def loss(*values, run=gated_delta_rule):
        output, state = run(*values)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(state))

    def run(*values):
        return gated_delta_rule(**dict(zip(names, values, strict=True)), segment_ids=ids, implementation=implementation)

    gradient = partial(jax.grad, argnums=tuple(range(len(names))))
    expected = jax.jit(gradient(partial(loss, run=run)))(*arguments.values())

    checkpointed = jax.jit(gradient(jax.checkpoint(jax.checkpoint(partial(loss, run=run)))))(*arguments.values())
    assert max(tree_errors(checkpointed, expected).values()) < 1e-6

    twice = jax.jit(jax.vmap(gradient(partial(loss, run=run))))(*(jnp.stack([x, 0.5 * x]) for x in arguments.values()))
    assert max(tree_errors([x[0] for x in twice], list(expected)).values()) < 1e-5

    axes = {"q": "b.h.", "k": "b.h.", "v": "b.h.", "beta": "b.h", "log_decay": "h", "initial_state": "bh.."}
    specs = {name: PartitionSpec(*(None if a == "." else {"b": "data", "h": "tensor"}[a] for a in text)) for name, text in axes.items()}
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(ids, *values):
        return gated_delta_rule(**dict(zip(names, values, strict=True)), segment_ids=ids, implementation=implementation)

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), *(specs[name] for name in names)),
        out_specs=(specs["v"], specs["initial_state"]),
    )
    found = jax.jit(gradient(partial(loss, run=partial(sharded, ids))))(*arguments.values())
    assert max(tree_errors(found, expected).values()) < 1e-6


def _program(T, implementation):
    def loss(q, k, v, beta, log_decay):
        output, state = gated_delta_rule(q, k, v, beta, log_decay=log_decay, implementation=implementation)
        return jnp.sum(output**2) + jnp.sum(state**2)

    shape = (2, T, 8, 64)
    x, gate = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    return jax.jit(jax.grad(loss, argnums=tuple(range(5)))), (x, x, x, gate, gate)


def test_no_state_is_kept_for_each_token():
    """Temporary memory of forward and backward: linear in T, and a small part of what autodiff of the token scan keeps."""

    def temporary(T, implementation):
        program, arguments = _program(T, implementation)
        return program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    state = 2 * 8 * 64 * 64 * 4
    xla = {T: temporary(T, "xla") for T in (2048, 4096)}
    assert temporary(4096, "reference") > 4096 * state
    assert xla[4096] < 4096 * state / 8
    assert xla[4096] < 2.1 * xla[2048]
    assert temporary(4096, "associative_scan") < 4096 * state


def test_lowers_for_a_tpu_on_a_cpu():
    """The form for the platform is chosen where the program is lowered: all heads at once on a TPU, a few at a time on a CPU."""
    program, arguments = _program(128, "xla")
    text = {p: jax.export.export(program, platforms=[p])(*arguments).mlir_module() for p in ("tpu", "cpu")}
    assert "tensor<16x128x64xf32>" in text["tpu"] and "tensor<8x64x32xf32>" not in text["tpu"]
    assert "tensor<8x64x32xf32>" in text["cpu"] and "tensor<16x128x64xf32>" not in text["cpu"]
    both = jax.export.export(program, platforms=["cpu", "tpu"])(*arguments)
    assert both.platforms == ("cpu", "tpu")


@pytest.mark.parametrize("C", [16, 64, 128])
@pytest.mark.parametrize("kind", ["random", "same keys"])
def test_triangular_inverse(C, kind):
    """Against numpy; with one key over and over and beta = 2, where the powers of A reach 1e17 and cancel, float32 stays exact too."""
    rng = np.random.default_rng(8)
    A = np.tril(rng.normal(size=(3, C, C)) / 4 if kind == "random" else np.full((3, C, C), 2.0), -1)
    expected = np.linalg.inv(np.eye(C) + A)
    with jax.enable_x64(True):
        assert relative_error(jax.jit(triangular.inverse)(jnp.asarray(A)), expected) < 1e-12
    assert relative_error(jax.jit(triangular.inverse)(jnp.asarray(A, jnp.float32)), expected) < 1e-5


@pytest.mark.parametrize("name", [name for name in shapes.SHAPES if name.startswith("tiny")])
def test_named_shapes(name):
    shape = shapes.SHAPES[name]
    arguments = shapes.inputs(shape, jax.random.key(0))
    output, state = jax.eval_shape(gated_delta_rule, **arguments)
    assert output.shape == (shape.B, shape.T, shape.HV, shape.V) and state.shape == (shape.B, shape.HV, shape.K, shape.V)
    assert shapes.flops(shape) > 0 and shapes.bytes_moved(shape, jnp.bfloat16) < shapes.bytes_moved(shape)


def test_flops_of_the_goal():
    shape = shapes.SHAPES["goal"]
    assert shapes.flops(shape) == 180224 * shape.T * shape.HV


WRONG = {
    "q rank": ({"q": (2, 5, 16)}, "q has shape"),
    "k heads": ({"k": (2, 5, 3, 16)}, "k has shape"),
    "k width": ({"k": (2, 5, 2, 8)}, "k has shape"),
    "v time": ({"v": (2, 6, 4, 8)}, "v has shape"),
    "v heads": ({"v": (2, 5, 3, 8), "beta": (2, 5, 3), "log_decay": (2, 5, 3)}, "multiple"),
    "beta heads": ({"beta": (2, 5, 2)}, "beta has shape"),
    "log_decay rank": ({"log_decay": (2, 5)}, "log_decay has shape"),
    "log_decay width": ({"log_decay": (2, 5, 4, 8)}, "log_decay has shape"),
    "initial_state": ({"initial_state": (2, 4, 8, 16)}, "initial_state has shape"),
    "segment_ids shape": ({"segment_ids": (2, 6)}, "segment_ids has shape"),
    "no token": ({"q": (2, 0, 2, 16), "k": (2, 0, 2, 16), "v": (2, 0, 4, 8), "beta": (2, 0, 4), "log_decay": (4,)}, "needs T >= 1"),
}


@pytest.mark.parametrize("shapes_, message", WRONG.values(), ids=WRONG)
def test_wrong_shapes_are_named(shapes_, message):
    good = {"q": (2, 5, 2, 16), "k": (2, 5, 2, 16), "v": (2, 5, 4, 8), "beta": (2, 5, 4), "log_decay": (2, 5, 4)}
    arguments = {name: jnp.zeros(shape, int if name == "segment_ids" else float) for name, shape in (good | shapes_).items()}
    with pytest.raises(ValueError, match=f"gated_delta_rule: .*{message}"):
        gated_delta_rule(**arguments)


def test_wrong_dtypes_and_names():
    x, gate = jnp.zeros((2, 5, 2, 16)), jnp.zeros((2, 5, 2))
    with pytest.raises(ValueError, match="beta has dtype int32"):
        gated_delta_rule(x, x, x, gate.astype(int))
    with pytest.raises(ValueError, match="segment_ids has dtype float32"):
        gated_delta_rule(x, x, x, gate, segment_ids=jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="no implementation 'fastest'; choose one of"):
        gated_delta_rule(x, x, x, gate, implementation="fastest")
    with pytest.raises(ValueError, match="gated_delta_rule: q is a list, needs an array"):
        gated_delta_rule(x.tolist(), x, x, gate)
    with pytest.raises(ValueError, match="gated_delta_rule: log_decay is a float, needs an array"):
        gated_delta_rule(x, x, x, gate, log_decay=-0.1)
    with pytest.raises(ValueError, match="gated_delta_rule: segment_ids is a list, needs an array"):
        gated_delta_rule(x, x, x, gate, segment_ids=[[1] * 5] * 2)
    with pytest.raises(TypeError, match="positional"):  # gated_linear_attention has its decays in the fourth place, and the same shape
        gated_delta_rule(x, x, x, -gate, gate)
    with pytest.raises(ValueError, match=r"gated_delta_rule_step: state has shape \(2, 2, 16, 8\)"):
        gated_delta_rule_step(x[:, 0], x[:, 0], x[:, 0], gate[:, 0], None, jnp.zeros((2, 2, 16, 8)))
