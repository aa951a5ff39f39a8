"""Operators on sequences dealt over devices, against the whole sequence token by token, in float64: outputs, states, every gradient."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention, attention_stretch
from pallas_kernels.attention.stretch import routes
from pallas_kernels.causal_conv import causal_conv, causal_conv_stretch
from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_stretch
from pallas_kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_stretch
from pallas_kernels.linear_scan import linear_scan, linear_scan_stretch
from tests.helpers import random_segment_ids, tree_errors

B, H, HV, K, V, D, W = 6, 2, 4, 4, 3, 5, 4
# Two tokens a device: documents over many devices, an id used again, devices of padding alone at every place, shorter than a convolution.
ROWS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3],
        [0, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0],
        [5, 5, 0, 0, 0, 0, 5, 5, 4, 0, 0, 0, 0, 0, 5, 5],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 2, 3, 1, 2, 2, 3, 3, 3, 1, 2, 1, 2, 2, 2, 2],
    ]
)


class Operator(NamedTuple):
    """An operator, itself for a stretch, and its arguments: those of every token, those of none, its state."""

    whole: Callable
    stretch: Callable
    tokens: dict[str, tuple[int, ...]]  # shapes behind [B,T]
    fixed: dict[str, tuple[int, ...]]
    state: tuple[int, ...] | None  # behind [B]
    options: dict = {}


GLA = dict(tokens=dict(q=(H, K), k=(H, K), v=(HV, V)), fixed={}, state=(HV, K, V))
DELTA = dict(tokens=dict(q=(H, K), k=(H, K), v=(HV, V), beta=(HV,)), fixed={}, state=(HV, K, V))
QKV = dict(q=(HV, K), k=(H, K), v=(H, V))


def with_decay(base, axes, where="tokens"):
    return base | {where: base[where] | {"log_decay": axes}}


OPERATORS = {
    "linear_scan": Operator(linear_scan, linear_scan_stretch, dict(decay=(D,), x=(D,)), {}, (D,)),
    "gla, fixed": Operator(gated_linear_attention, gated_linear_attention_stretch, **with_decay(GLA, (HV,), "fixed")),
    "gla, a head": Operator(gated_linear_attention, gated_linear_attention_stretch, **with_decay(GLA, (HV,))),
    "gla, a channel": Operator(gated_linear_attention, gated_linear_attention_stretch, **with_decay(GLA, (HV, K))),
    "delta": Operator(gated_delta_rule, gated_delta_rule_stretch, **DELTA),
    "delta, fixed": Operator(gated_delta_rule, gated_delta_rule_stretch, **with_decay(DELTA, (HV,), "fixed")),
    "delta, a head": Operator(gated_delta_rule, gated_delta_rule_stretch, **with_decay(DELTA, (HV,))),
    "delta, a channel": Operator(gated_delta_rule, gated_delta_rule_stretch, **with_decay(DELTA, (HV, K))),
    "conv": Operator(causal_conv, causal_conv_stretch, dict(x=(D,)), dict(weight=(D, W)), (W - 1, D), dict(activation="silu")),
    "conv, one tap": Operator(causal_conv, causal_conv_stretch, dict(x=(D,)), dict(weight=(D, 1)), (0, D)),
    "attention": Operator(attention, attention_stretch, QKV, {}, None),
    "attention, window": Operator(attention, attention_stretch, QKV, {}, None, dict(window=3)),
}


def arguments(rng, operator, T, strong):
    """Random float64 arguments; decays anything from none to all but all, strong ones on top; padding is filled in by the caller."""

    def draw(name, shape):
        x = rng.normal(size=shape)
        if name == "log_decay":
            return -np.exp(x) * np.where(rng.random(shape) < 0.2, 50.0 if strong else 0.0, 1.0)
        if name == "decay":
            return rng.random(shape) * np.where(rng.random(shape) < 0.2, 0.0 if strong else 1.0, 1.0)
        if name == "beta":
            return rng.random(shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True) if name == "k" else x

    found = {name: draw(name, (B, T, *shape)) for name, shape in operator.tokens.items()}
    found |= {name: draw(name, shape) for name, shape in operator.fixed.items()}
    if operator.state is not None:
        found["initial_state"] = draw("initial_state", (B, *operator.state))
    return found


def with_nan(given, operator, segment_ids):
    """nan at padding, which must not be seen."""
    real = np.asarray(segment_ids) != 0

    def padded(x):
        return np.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, np.nan)

    return {name: padded(x) if name in operator.tokens else x for name, x in given.items()}


def results(run, given, segment_ids, weights):
    """Everything that comes out: the results, and the gradient of a random sum of them by every argument."""

    def loss(given):
        out = run(segment_ids, given)
        return sum(jnp.sum(w * o) for w, o in zip(weights, jax.tree.leaves(out), strict=True)), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(given)
    return out, gradients


def both(operator, devices, given, segment_ids, implementation=None):
    """The results of the whole sequence, token by token, and of its stretches."""
    reference = partial(operator.whole, implementation="reference", **operator.options)
    shapes = jax.tree.leaves(jax.eval_shape(lambda given: reference(**given, segment_ids=segment_ids), given))
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s.shape) for s in shapes]

    def whole(segment_ids, given):
        return reference(**given, segment_ids=segment_ids)

    runs = dealt(operator, devices, implementation), whole
    return [jax.jit(partial(results, run, weights=weights))(given, segment_ids) for run in runs]


def dealt(operator, devices, implementation=None):
    """(segment_ids, arguments) of whole sequences -> the operator's results, each of ``devices`` with its stretch."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("seq",))
    stretch = partial(operator.stretch, axis_name="seq", implementation=implementation, **operator.options)

    def run(segment_ids, given):
        specs = {name: P(None, "seq") if name in operator.tokens else P() for name in given}
        out = (P(None, "seq"), P()) if operator.state is not None else P(None, "seq")
        ids = None if segment_ids is None else P(None, "seq")

        def local(segment_ids, given):
            return stretch(**given, segment_ids=segment_ids)

        return jax.shard_map(local, mesh=mesh, in_specs=(ids, specs), out_specs=out, check_vma=False)(segment_ids, given)

    return run


FAST = [(name, True) for name in ("linear_scan", "gla, a channel", "delta, a head", "conv", "attention, window")]
SLOW = [(name, documents) for name in OPERATORS for documents in (True, False) if (name, documents) not in FAST]


@pytest.mark.parametrize("name, documents", [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_eight_stretches_of_two_tokens(name, documents):
    operator = OPERATORS[name]
    with jax.enable_x64():
        given = arguments(np.random.default_rng(1), operator, ROWS.shape[1], strong=documents)
        if documents:
            given = with_nan(given, operator, ROWS)
        found, expected = both(operator, 8, given, jnp.asarray(ROWS) if documents else None)
        errors = tree_errors(found, expected)
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ("conv, one tap", "delta, fixed", "gla, fixed")])
def test_random_documents(name, devices):
    """Stretches longer than a chunk or a block, that are no multiple of it."""
    operator = OPERATORS[name]
    rng = np.random.default_rng(devices)
    T = devices * 77
    with jax.enable_x64():
        given = arguments(rng, operator, T, strong=devices == 4)
        found, expected = both(operator, devices, given, random_segment_ids(rng, B, T, mean_length=40))
        errors = tree_errors(found, expected)
    assert max(errors.values()) < 1e-11, errors


@pytest.mark.parametrize("T, window, documents", [(130, None, True), pytest.param(256, 300, False, marks=pytest.mark.slow)])
def test_attention_kernel_on_stretches(T, window, documents):
    """Splash attention with the tables of a stretch, interpreted: blocks of 128 and of padding, windows over block borders."""
    operator = OPERATORS["attention"]._replace(options=dict(window=window))
    rng = np.random.default_rng(5)
    given = {name: jnp.asarray(x, jnp.float32) for name, x in arguments(rng, operator, 4 * T, strong=False).items()}
    found, expected = both(operator, 4, given, random_segment_ids(rng, B, 4 * T, mean_length=90) if documents else None, "pallas")
    errors = tree_errors(found, expected)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_attention_is_as_much_work_on_every_device(devices):
    """Each half of queries meets the halves of keys before it, and its own by half."""
    given = [[] for _ in range(devices)]
    for first, route in enumerate(routes(devices)):
        for source, target in route:
            given[target].append(2 * source + first)
    for at, halves in enumerate(given):
        assert halves == [at, 2 * devices - 1 - at][:: -1 if at % 2 else 1]
        assert sum(half + 0.5 for half in halves) == 2 * devices


def test_windows_over_padding_are_refused_by_the_kernel():
    operator = OPERATORS["attention, window"]
    given = {name: jnp.asarray(x, jnp.float32) for name, x in arguments(np.random.default_rng(0), operator, 16, strong=False).items()}
    with pytest.raises(ValueError, match="windows over padding, and 2 tokens are not twice whole blocks, take implementation='xla'"):
        dealt(operator, 8, "pallas")(None, given)


COLLECTIVES = {"ppermute", "all_gather", "psum", "psum_invariant", "reduce_scatter", "all_to_all"}


def sent(jaxpr) -> dict[str, list[int]]:
    """By collective, the bytes that a device hands to each."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in COLLECTIVES:
            found.setdefault(equation.primitive.name, []).append(sum(a.aval.size * a.aval.dtype.itemsize for a in equation.invars))
        for inner in jaxprs_in_params(equation.params):
            for name, sizes in sent(inner).items():
                found.setdefault(name, []).extend(sizes)
    return found


@pytest.mark.parametrize("name", ["linear_scan", "gla, a channel", "delta, a head", "conv"])
def test_what_a_linear_layer_sends_does_not_grow_with_time(name):
    operator = OPERATORS[name]

    def traffic(T):
        given = arguments(np.random.default_rng(0), operator, T, strong=False)
        given = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}

        def total(given):
            return sum(jnp.sum(o) for o in dealt(operator, 8, "xla")(jnp.ones((B, T), jnp.int32), given))

        return sent(jax.make_jaxpr(jax.grad(total))(given).jaxpr)

    short = traffic(64)
    assert short == traffic(512)
    assert sum(map(sum, short.values())) > 0
