"""The models against their equations, and what must hold whatever the mixer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import config, layout, mixers
from hybrid_jax import model as models
from hybrid_jax.loss import batch_losses
from pallas_kernels import platforms, segments
from tests.helpers import relative_error, tree_errors
from tests.hybrid_jax import reference_model
from tests.hybrid_jax.random_models import random_model

FAMILIES = {
    "hgrn": config.HGRN(),
    "hgrn2": config.HGRN2(expand_ratio=16),
    "retnet": config.RetNet(heads=2),
    "gla": config.GLA(heads=2),
    "delta_net": config.DeltaNet(heads=2),
    "gated_delta_net": config.GatedDeltaNet(heads=2, head_width=12),
    "kda": config.KDA(heads=2, head_width=12),
}
OPTIONS = {
    "hgrn wide, conv": config.HGRN(expand_ratio=2, conv_width=4),
    "hgrn2 conv": config.HGRN2(expand_ratio=8, conv_width=3),
    "hgrn unbounded, no scale": config.HGRN(lower_bound=False, norm_scale=False),
    "hgrn2 unbounded, no scale": config.HGRN2(expand_ratio=8, lower_bound=False, norm_scale=False),
    **{f"gla {name}": config.GLA(heads=2, feature_map=name, norm_scale=False) for name in ("relu", "sigmoid", "logsigmoid", "silu")},
    **{f"retnet {name}": config.RetNet(heads=2, feature_map=name, norm_scale=False) for name in ("sqrelu", "gelu")},
    "gated_delta_net sigmoid gate": config.GatedDeltaNet(heads=2, head_width=8, gate_activation="sigmoid"),
    "retnet shared keys, no gate": config.RetNet(heads=4, kv_heads=2, expand_k=0.5, expand_v=1.0, output_gate=False),
    "gla shared keys, conv, bounded": config.GLA(heads=4, kv_heads=2, expand_k=1.0, conv_width=4, log_decay_min=-0.04),
    "gla no gate": config.GLA(heads=2, output_gate=False),
    "delta_net plain": config.DeltaNet(heads=2, conv_width=0, beta=False, qk_activation="elu", qk_norm="sum"),
    "delta_net gate, negative": config.DeltaNet(heads=2, output_gate=True, qk_activation="relu", negative_eigenvalues=True, expand_v=2.0),
    "gated_delta_net grouped": config.GatedDeltaNet(heads=2, value_heads=4, head_width=8, expand_v=2.0, negative_eigenvalues=True),
    "kda grouped, bounded, plain": config.KDA(2, 4, 8, expand_v=2.0, conv_width=0, negative_eigenvalues=True, log_decay_min=-5.0),
    "gated_delta_net zero, plain": config.GatedDeltaNet(heads=2, head_width=8, conv_width=0, output_gate=False, decay_init="zero"),
}
pytestmark = pytest.mark.usefixtures("one_device")
SMALL = dict(layers=3, width=32, vocabulary=61, mlp_width=48, dtype="float32", remat="none", init_std=0.2)
HYBRID = SMALL | dict(ratio=3, attention=config.Attention(heads=2))
T = 37


def build(mixer, seed=0, **changes):
    """A small model."""
    return random_model(config.ModelConfig(mixer=mixer, **(HYBRID | changes)), seed)


def to_numpy(model):
    """(top-level parameters, layer -> its block's parameters), float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))
    where = {}
    for s, stage in enumerate(layout.stages(model.config.layer_kinds)):
        for r in range(len(stage.runs)):
            for i, repeat in enumerate(stage.layers(r)):
                where |= {layer: (s, r, i, j) for j, layer in enumerate(repeat)}

    def layer_params(layer):
        s, r, i, j = where[layer]
        return jax.tree.map(lambda x: x[i, j], params["stages"][s]["runs"][r])

    return params, layer_params


def random_tokens(B, T, seed=0):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, SMALL["vocabulary"])


def check_equations(model):
    tokens = random_tokens(1, T)
    expected = reference_model.logits(model.config, *to_numpy(model), np.asarray(tokens[0]))
    # float32 against float64: rounding grows through three layers, 2e-6 as a rule
    assert relative_error(model(tokens)[0], expected) < 2e-5


@pytest.mark.parametrize("mixer", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_follow_the_equations(mixer):
    check_equations(build(mixer, ratio=None, layers=2))


def test_transformer_follows_the_equations():
    attention = config.Attention(heads=4, kv_heads=2, qkv_bias=True, qk_norm=True, window=9, rope_theta=500.0)
    check_equations(build(attention, ratio=None, tied=True))


def test_attention_without_positions_follows_the_equations():
    """NoPE: a head may then be of any width."""
    check_equations(build(config.GLA(heads=2), ratio=2, layers=2, width=36, attention=config.Attention(heads=4, rope_theta=None)))


@pytest.mark.parametrize("layers, full", [(5, (0, 3)), pytest.param(6, (1, 3, 5), marks=pytest.mark.slow)])
def test_any_list_of_attention_layers(layers, full):
    check_equations(build(config.GLA(heads=2), layers=layers, ratio=None, attention_layers=full))


# One row of 48 tokens each, as segment ids: one compilation serves them all.
ROWS = {
    "one document": [1] * 48,
    "packed": [1] * 20 + [2] * 15 + [1] * 13,
    "padded": [0] * 5 + [3] * 14 + [0] * 4 + [3] * 2 + [7] * 17 + [0] * 6,
}


@pytest.mark.parametrize("mixer", FAMILIES.values(), ids=FAMILIES.keys())
def test_documents_in_a_row_follow_the_equations_alone(mixer):
    model = build(mixer, seed=3)
    run = jax.jit(model)
    parameters = to_numpy(model)
    tokens = random_tokens(1, 48, seed=3)
    for name, ids in ROWS.items():
        logits = run(tokens, jnp.array([ids], jnp.int32))[0]
        index, real = (np.asarray(a[0]) for a in segments.number(jnp.array([ids], jnp.int32)))
        for document in range(index[-1] + 1):
            own = np.flatnonzero((index == document) & real)
            expected = reference_model.logits(model.config, *parameters, np.asarray(tokens[0])[own])
            assert relative_error(logits[own], expected) < 2e-5, name


@pytest.mark.parametrize("unrolled", [False, True])  # True: as for GPUs
def test_remat_changes_memory_not_numbers(unrolled, monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "gpu" if unrolled else "cpu")
    tokens = random_tokens(8, 64)
    params = nnx.state(build(config.RetNet(heads=2), layers=4, ratio=None))
    results, temporary = {}, {}
    for remat in ("none", "operators", "block"):
        graph, _ = models.abstract(config.ModelConfig(mixer=config.RetNet(heads=2), **(SMALL | dict(layers=4, remat=remat))))

        @jax.jit
        @jax.value_and_grad
        def loss(params, graph=graph):
            model = nnx.merge(graph, params)
            return jnp.mean(jnp.square(model.logits(model.hidden(tokens))))  # not model(tokens): traced once, on one platform

        lowered = loss.lower(params)
        # without a loop around it, what is computed again is told from what was computed before
        assert ("optimization_barrier" in lowered.as_text()) == (unrolled and remat != "none")
        compiled = lowered.compile()
        results[remat], temporary[remat] = compiled(params), compiled.memory_analysis().temp_size_in_bytes
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(results[remat][1]))
    if not unrolled:  # XLA for CPUs does not order what is to be computed again by the memory that it takes
        assert temporary["block"] < temporary["operators"] < temporary["none"], temporary
    for remat in ("operators", "block"):
        # recomputed values may be fused differently, which moves float32 rounding
        assert max(tree_errors(results[remat], results["none"]).values()) < 1e-4


@pytest.mark.parametrize("remat", ["operators", "block"])
def test_attention_is_not_computed_again(remat, monkeypatch):
    mixer = config.Attention(heads=2)
    attention = config.ModelConfig(mixer=mixer, **(SMALL | {"layers": 2, "remat": remat}))

    def products():
        graph, params = models.abstract(attention)
        loss = jax.grad(lambda params: jnp.sum(nnx.merge(graph, params).hidden(random_tokens(1, 16))))
        return str(jax.make_jaxpr(loss)(params)).count("dot_general")

    kept = products()
    policies = {"operators": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "block": jax.checkpoint_policies.nothing_saveable}
    monkeypatch.setattr(models, "REMAT_POLICIES", policies)
    assert products() == kept + 2  # of queries with keys, of weights with values


def test_one_layer_is_computed_again_too():
    """XLA unrolls its loop, and would find forward's values in what backward computes again."""
    graph, params = models.abstract(config.ModelConfig(mixer=config.RetNet(heads=2), **(SMALL | {"layers": 1, "remat": "block"})))
    loss = jax.grad(lambda params: jnp.sum(nnx.merge(graph, params).hidden(random_tokens(1, 16))))
    assert "optimization_barrier" in jax.jit(loss).lower(params).as_text()


def count_equations(jaxpr) -> int:
    inner = [v for eqn in jaxpr.eqns for v in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")) if hasattr(v, "jaxpr")]
    return len(jaxpr.eqns) + sum(count_equations(closed.jaxpr) for closed in inner)


@pytest.mark.parametrize("ratio", [3, 24])
def test_program_does_not_grow_with_depth(ratio):
    def program(layers):
        model = config.ModelConfig(mixer=config.GLA(heads=2), **(HYBRID | dict(layers=layers, ratio=ratio)))
        graph, params = models.abstract(model)
        loss = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p).hidden(jnp.zeros((1, 64), int))))
        return count_equations(jax.make_jaxpr(loss)(params).jaxpr)

    shallow, deep = program(48), program(96)
    if ratio == 24:  # 24:1 of 24 layers too: no more than another scan's set-up beside 3:1
        assert abs(program(24) - shallow) < 0.25 * shallow
    assert deep == shallow


def test_layers_one_after_the_other_are_traced_once(monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    traced, call = [], models.Block.__call__
    monkeypatch.setattr(models.Block, "__call__", lambda block, *given: traced.append(block.kind) or call(block, *given))
    graph, params = models.abstract(config.ModelConfig(mixer=config.GLA(heads=2), **(HYBRID | dict(layers=12))))
    jax.make_jaxpr(lambda p: nnx.merge(graph, p).hidden(jnp.zeros((1, 64), int)))(params)
    assert traced == ["gla", "attention"]


# Parameters of the study's models in millions, untied and tied, and the exact count of one released checkpoint.
COUNTS = [
    (config.Attention(heads=16), 1024, 4.0, 373.9, 341.1),
    (config.HGRN(), 1024, 4.0, 373.9, 341.1),
    (config.HGRN2(), 1024, 4.0, 373.9, 341.1),
    (config.GLA(), 1024, 4.0, 374.5, 341.7),
    (config.DeltaNet(), 1024, 4.0, 374.4, 341.6),
    (config.RetNet(), 1024, 2.0, 380.2, 347.4),
    (config.GatedDeltaNet(), 1024, 4.0, 399.5, None),
    (config.Attention(heads=32), 2048, 4.0, 1364.3, None),
    (config.HGRN(), 2048, 4.0, 1364.4, None),
    (config.HGRN2(), 2048, 4.0, 1364.4, None),
    (config.GLA(), 2048, 4.0, 1365.5, None),
    (config.DeltaNet(heads=16), 2048, 4.0, 1365.7, None),
    (config.RetNet(), 2048, 2.0, 1351.7, None),
    (config.GatedDeltaNet(heads=8), 2048, 4.0, 1466.343808, None),
]


@pytest.mark.parametrize("mixer, width, mlp_ratio, untied, tied", COUNTS)
def test_parameter_counts_of_the_study(mixer, width, mlp_ratio, untied, tied):
    for expected, tie in ((untied, False), (tied, True)):
        if expected is not None:
            model = config.ModelConfig(mixer=mixer, width=width, mlp_ratio=mlp_ratio, tied=tie)
            count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(models.abstract(model)[1]))
            assert round(count / 1e6, 6 if isinstance(expected, float) and len(str(expected)) > 8 else 1) == expected


def test_initial_values():
    model = models.build(config.ModelConfig(mixer=config.GatedDeltaNet(8, head_width=16), layers=24, width=128, vocabulary=64), 1)
    mixer = model.stages[0].runs[0].mixer
    assert mixer.q_proj.kernel.shape == (1, 24, 128, 128)
    assert abs(float(jnp.std(mixer.q_proj.kernel[...])) - 0.02) < 2e-4
    assert abs(float(jnp.std(mixer.q_conv.weight[...])) - 0.02) < 1e-3
    assert not jnp.array_equal(mixer.q_proj.kernel[0, 0], mixer.q_proj.kernel[0, 1])
    A, dt = jnp.exp(mixer.A_log[...]), jax.nn.softplus(mixer.dt_bias[...])
    assert 0 < A.min() and A.max() < 16 and abs(float(A.mean()) - 8) < 1.5  # 192 draws from U(0, 16): s.d. of the mean 0.33
    assert 0.999e-3 < dt.min() and dt.max() < 1.001e-1 and abs(float(jnp.log(dt).mean()) - math.log(1e-2)) < 0.4
    rescaled = models.build(dataclasses.replace(model.config, residual_init="rescaled")).stages[0].runs[0]
    for kernel in (rescaled.mixer.o_proj.kernel[...], rescaled.mlp.down_proj.kernel[...]):
        assert abs(float(jnp.std(kernel)) * math.sqrt(3 * kernel.shape[-2] * 48) - 1) < 0.01
    assert abs(float(jnp.std(rescaled.mixer.q_proj.kernel[...])) - 0.02) < 2e-4
    zero = dataclasses.replace(model.config, mixer=config.GatedDeltaNet(heads=8, head_width=16, decay_init="zero"))
    mixer = models.build(zero).stages[0].runs[0].mixer
    assert not mixer.A_log[...].any() and not mixer.dt_bias[...].any()


@pytest.mark.parametrize("bounded", [False, True])
def test_initial_decays_of_kda(bounded):
    kda = config.KDA(heads=256, head_width=2, expand_v=8.0, log_decay_min=-5.0 if bounded else None)
    mixer = mixers.build(kda, config.ModelConfig(mixer=kda, width=32), nnx.Rngs(1))
    A, dt = jnp.exp(mixer.A_log[...]), jax.nn.softplus(mixer.dt_bias[...])
    assert A.shape == (256,) and dt.shape == (512,)
    if bounded:
        assert (A == 1).all()
    else:
        assert 1 < A.min() and A.max() < 16 and abs(float(A.mean()) - 8.5) < 1.1  # 256 draws from U(1, 16): s.d. of the mean 0.27
    assert 0.999e-3 < dt.min() and dt.max() < 1.001e-1 and abs(float(jnp.log(dt).mean()) - math.log(1e-2)) < 0.25  # s.d. 0.06
    assert not mixer.gate_out.bias[...].any() and mixer.decay_out.bias is None
    assert abs(float(jnp.std(mixer.decay_out.kernel[...])) - 0.02) < 1e-3  # 8192 draws


def test_same_seed_same_model():
    one, same, other = (models.build(config.ModelConfig(mixer=config.HGRN(), **HYBRID), seed) for seed in (5, 5, 6))
    equal = [jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(same)), strict=True)]
    assert all(equal)
    assert not jnp.array_equal(one.embedding.table[...], other.embedding.table[...])


def slow_but(default):
    return [pytest.param(mixer, id=name, marks=() if name == default else pytest.mark.slow) for name, mixer in FAMILIES.items()]


@pytest.mark.parametrize("mixer", slow_but("gated_delta_net"))
def test_bfloat16_compute_stays_close(mixer):
    model = models.build(config.ModelConfig(mixer=mixer, **HYBRID))
    half = nnx.merge(models.abstract(dataclasses.replace(model.config, dtype="bfloat16"))[0], nnx.state(model))
    tokens = random_tokens(1, T)
    logits = half(tokens)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4 % an operation, a few per cent through three layers
    assert relative_error(logits, model(tokens)) < 0.06


@pytest.mark.parametrize("mixer", slow_but("hgrn"))
def test_gradients_in_bfloat16_stay_close(mixer):
    """Of every parameter, over 4,096 tokens of which a fifth are the same one: sums over tokens are of more than bfloat16's digits."""
    one = config.ModelConfig(mixer=mixer, **(HYBRID | {"init_std": 0.05}))
    frequencies = 1 / np.arange(1, 62)
    tokens = np.random.default_rng(0).choice(61, (4, 1025), p=frequencies / frequencies.sum()).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((4, 1024), np.float32)}
    params = nnx.state(models.build(one))

    def gradients(dtype):
        graph = models.abstract(dataclasses.replace(one, dtype=dtype))[0]
        return jax.jit(jax.grad(lambda params: batch_losses(nnx.merge(graph, params), batch).total))(params)

    errors = tree_errors(gradients("bfloat16"), gradients("float32"))
    assert max(errors.values()) < 0.05, errors  # three per cent as a rule
