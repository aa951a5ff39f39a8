"""Schedules, decay masks, Muon on stacked weights and schedule-free, against their equations in numpy."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from hybrid_jax.config import KDA, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from hybrid_jax.model import abstract
from hybrid_jax.train.optimizer import evaluation_params, make_optimizer, schedule
from tests.helpers import relative_error

STEPS = 100


class Weights(nnx.Module):
    """Parameters of every kind a model has: stacked matrices and vectors, an embedding, an output kernel, convolution taps."""

    def __init__(self, seed=0):
        keys = iter(jax.random.split(jax.random.key(seed), 6))
        self.matrix = nnx.Param(jax.random.normal(next(keys), (2, 3, 8, 16)), axes=("embed", "mlp"))
        self.tall = nnx.Param(jax.random.normal(next(keys), (16, 8)), axes=("mlp", "embed"))
        self.gain = nnx.Param(jax.random.normal(next(keys), (2, 3, 8)), axes=("embed",))
        self.table = nnx.Param(jax.random.normal(next(keys), (30, 8)), axes=("vocabulary", "embed"))
        self.output = nnx.Param(jax.random.normal(next(keys), (8, 30)), axes=("embed", "vocabulary"))
        self.taps = nnx.Param(jax.random.normal(next(keys), (2, 3, 4, 8)), axes=("taps", "embed"))


def weights(seed=0) -> nnx.State:
    return nnx.split(Weights(seed))[1]


def arrays(params: nnx.State) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in nnx.to_pure_dict(params).items()}


def updates(config: OptimizerConfig, gradients: list[nnx.State], params: nnx.State):
    """Parameters after each gradient, and the last state."""
    optimizer = make_optimizer(config, STEPS, params)
    state, history = optimizer.init(params), []
    for gradient in gradients:
        update, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, update)
        history.append(params)
    return history, state


def test_the_schedule_warms_up_and_falls_as_a_cosine():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4, final_fraction=0.2)
    rates = [float(schedule(config, 10)(n)) for n in range(12)]
    warmup = [0.1 * (n + 1) / 5 for n in range(4)]
    cosine = [0.1 * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * n / 5))) for n in range(6)]
    assert cosine[-1] == pytest.approx(0.1 * 0.2)  # of the tenth step, the last
    np.testing.assert_allclose(rates, [*warmup, *cosine, *[cosine[-1]] * 2], rtol=1e-5)


def test_the_schedules_that_fall_linearly():
    """From the peak, or over the last steps alone; what stands before the fall is the same in a longer run, to the last bit."""
    options = {"learning_rate": 0.1, "warmup_steps": 4, "final_fraction": 0.2}
    warmup = [0.1 * (n + 1) / 5 for n in range(4)]
    linear = schedule(OptimizerConfig(schedule="linear", **options), 10)
    np.testing.assert_allclose([linear(n) for n in range(12)], [*warmup, *(0.1 - 0.08 * n / 5 for n in range(6)), 0.02, 0.02], rtol=1e-6)
    config = OptimizerConfig(schedule="wsd", decay_steps=4, **options)
    stable = [schedule(config, steps) for steps in (20, 30)]
    falling = [0.1 - 0.08 * n / 4 for n in (1, 2, 3, 4)]
    np.testing.assert_allclose([stable[0](n) for n in range(22)], [*warmup, *[0.1] * 12, *falling, 0.02, 0.02], rtol=1e-6)
    run = RunConfig(optimizer=config, train=TrainConfig(steps=20))
    same = [float(stable[0](n)) == float(stable[1](n)) for n in range(20)]
    assert same == [True] * run.open_steps + [False] * 4
    assert RunConfig().open_steps == 0 and RunConfig(optimizer=OptimizerConfig(name="schedule_free")).open_steps == TrainConfig().steps


def test_schedules_at_their_edges():
    tight = schedule(OptimizerConfig(schedule="wsd", learning_rate=0.1, warmup_steps=2, decay_steps=7, final_fraction=0.0), 10)
    np.testing.assert_allclose([tight(n) for n in (1, 2, 3, 8, 9)], [0.2 / 3, 0.1, 0.6 / 7, 0.1 / 7, 0.0], rtol=1e-5)
    assert float(schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=0), 10)(0)) == pytest.approx(0.1)
    endless = schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=50), 10)  # longer than the run
    np.testing.assert_allclose([endless(9), endless(50)], [0.1 * 10 / 51, 0.1], rtol=1e-5)
    free = schedule(OptimizerConfig(name="schedule_free", learning_rate=0.1, warmup_steps=2), 10)
    np.testing.assert_allclose([free(n) for n in (0, 2, 9)], [0.1 / 3, 0.1, 0.1], rtol=1e-6)


def test_adamw_follows_its_equations_and_decays_no_vector():
    # neither optax's defaults nor ours, and an eps of the size of what it is added to
    moments = {"beta1": 0.8, "beta2": 0.7, "eps": 0.01}
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.3, clip_norm=1.0, final_fraction=1.0, **moments)
    params, gradients = weights(0), [weights(seed) for seed in (1, 2, 3)]
    history, _ = updates(config, gradients, params)
    expected, m, v = arrays(params), dict.fromkeys(arrays(params), 0.0), dict.fromkeys(arrays(params), 0.0)
    for n, gradient in enumerate(gradients, 1):
        g = arrays(gradient)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for name, w in expected.items():
            clipped = g[name] / max(1.0, norm / config.clip_norm)
            m[name] = 0.8 * m[name] + 0.2 * clipped
            v[name] = 0.7 * v[name] + 0.3 * clipped**2
            step = m[name] / (1 - 0.8**n) / (np.sqrt(v[name] / (1 - 0.7**n)) + 0.01)
            decay = 0.0 if name == "gain" else config.weight_decay
            expected[name] = w - 0.01 * (step + decay * w)
        for name, value in arrays(history[n - 1]).items():
            assert relative_error(value, expected[name]) < 1e-5, (n, name)


def test_muon_orthogonalizes_each_stacked_matrix_by_itself_and_nothing_else():
    config = OptimizerConfig(name="muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.0, clip_norm=1e9, final_fraction=1.0)
    params, gradient = weights(0), weights(1)
    before, after, g = arrays(params), arrays(updates(config, [gradient], params)[0][0]), arrays(gradient)
    for name in ("matrix", "tall"):
        steps = ((before[name] - after[name]) / 0.01).reshape(-1, *before[name].shape[-2:])
        for step, one in zip(steps, g[name].reshape(steps.shape), strict=True):
            scale = 0.2 * np.sqrt(max(step.shape))
            singular = np.linalg.svd(step / scale, compute_uv=False)
            assert 0.5 < singular.min() and singular.max() < 1.5  # what the five Newton-Schulz steps promise
            u, _, vt = np.linalg.svd(one, full_matrices=False)
            cosine = (step * (u @ vt)).sum() / np.linalg.norm(step) / np.linalg.norm(u @ vt)
            assert cosine > 0.95  # the gradient's own singular vectors, not those of its neighbours in the stack
    first = 0.9 * 0.1 / (1 - 0.9**2) + 1  # Nesterov-Adam's first step, of which Adam's is the sign of the gradient
    for name in ("gain", "table", "output", "taps"):
        np.testing.assert_allclose((before[name] - after[name]) / 0.01, first * np.sign(g[name]), atol=1e-2)


def test_under_muon_the_betas_are_of_adam_alone():
    options = {"name": "muon", "learning_rate": 0.01, "warmup_steps": 0, "clip_norm": 1e9}
    params, gradients = weights(0), [weights(1), weights(2)]
    results = [updates(OptimizerConfig(**options, **betas), gradients, params) for betas in ({}, {"beta1": 0.5}, {"beta2": 0.5})]
    one, *others = (arrays(history[-1]) for history, _ in results)
    for other in others:
        assert {name for name in one if np.array_equal(one[name], other[name])} == {"matrix", "tall"}
    states = jax.tree.leaves(results[0][1], is_leaf=lambda x: isinstance(x, optax.contrib.MuonState))
    (momentum,) = (arrays(state.mu) for state in states if isinstance(state, optax.contrib.MuonState))
    first, second = map(arrays, gradients)
    for name in ("matrix", "tall"):
        assert relative_error(momentum[name], 0.05 * (0.95 * first[name] + second[name])) < 1e-6


def test_muon_decays_what_it_orthogonalizes():
    plain = OptimizerConfig(name="muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.0)
    decayed = OptimizerConfig(name="muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.3)
    params, gradient = weights(0), weights(1)
    without, with_decay = (arrays(updates(config, [gradient], params)[0][0]) for config in (plain, decayed))
    for name, value in arrays(params).items():
        expected = 0.01 * 0.3 * value if name in ("matrix", "tall") else np.zeros_like(value)
        np.testing.assert_allclose(without[name] - with_decay[name], expected, atol=1e-6)


def test_schedule_free_evaluates_the_average_of_its_iterates():
    config = OptimizerConfig(name="schedule_free", learning_rate=0.01, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    params, gradients = weights(0), [weights(seed) for seed in (1, 2, 3)]
    history, state = updates(config, gradients, params)
    averaged = arrays(evaluation_params(config, history[-1], state))
    z, x = arrays(params), arrays(params)
    v = dict.fromkeys(z, 0.0)
    for n, gradient in enumerate(gradients, 1):
        for name, g in arrays(gradient).items():
            v[name] = 0.95 * v[name] + 0.05 * g**2
            z[name] = z[name] - 0.01 * g / (np.sqrt(v[name] / (1 - 0.95**n)) + config.eps)
            x[name] = x[name] + (z[name] - x[name]) / n
    for name in z:
        assert relative_error(averaged[name], x[name]) < 1e-5
        assert relative_error(arrays(history[-1])[name], 0.9 * x[name] + 0.1 * z[name]) < 1e-5


def test_schedule_free_decays_matrices_alone_and_weighs_its_iterates_by_their_rate():
    """While it warms up: a first iterate, of a small rate, counts for little in the average (arXiv 2405.15682)."""
    options = {"learning_rate": 0.01, "warmup_steps": 3, "weight_decay": 0.3, "beta2": 0.7, "eps": 0.1, "clip_norm": 1e9}
    config = OptimizerConfig(name="schedule_free", **options)
    params, gradients = weights(0), [weights(seed) for seed in (1, 2, 3)]
    history, state = updates(config, gradients, params)
    rates = [0.01 * (n + 1) / 4 for n in range(4)]
    y, z, x, v = arrays(params), arrays(params), arrays(params), dict.fromkeys(arrays(params), 0.0)
    for n, gradient in enumerate(gradients):
        share = rates[n + 1] ** 2 / sum(rate**2 for rate in rates[1 : n + 2])  # optax's weights are a step ahead of its updates
        for name, g in arrays(gradient).items():
            v[name] = 0.7 * v[name] + 0.3 * g**2
            decay = 0.0 if name == "gain" else 0.3 * y[name]
            z[name] = z[name] - rates[n] * (g / (np.sqrt(v[name] / (1 - 0.7 ** (n + 1))) + 0.1) + decay)
            x[name] = (1 - share) * x[name] + share * z[name]
            y[name] = 0.9 * x[name] + 0.1 * z[name]
    averaged, trained = arrays(evaluation_params(config, history[-1], state)), arrays(history[-1])
    for name, value in arrays(params).items():  # of the changes, which are small beside the parameters
        assert relative_error(averaged[name] - value, x[name] - value) < 1e-4, name
        assert relative_error(trained[name] - value, y[name] - value) < 1e-4, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_other_optimizers_evaluate_the_parameters_themselves(name):
    params = weights()
    optimizer = make_optimizer(OptimizerConfig(name=name), STEPS, params)
    assert evaluation_params(OptimizerConfig(name=name), params, jax.eval_shape(optimizer.init, params)) is params


def test_what_is_decayed_of_a_model_with_decays_and_biases():
    """Its matrices, embeddings and convolutions' taps; of KDA neither A_log nor dt_bias, nor the output gate's bias."""
    shapes = abstract(ModelConfig(mixer=KDA(heads=2, head_width=8), layers=2, width=16, vocabulary=20, mlp_width=24))[1]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.3)
    (after,), _ = updates(config, [jax.tree.map(np.zeros_like, params)], params)
    flat = [dict(nnx.to_flat_state(state)) for state in (params, after)]
    changed = {path[-1] for path in flat[0] if not np.array_equal(flat[0][path][...], flat[1][path][...])}
    assert changed == {"kernel", "table", "weight"}
    assert {path[-1] for path in flat[0]} - changed == {"A_log", "dt_bias", "bias", "scale"}
