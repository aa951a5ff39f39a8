"""The training step: exact accumulation, the same on every mesh, compiled once, and unmoved by what is not finite."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hybrid_jax.config import ConfigError, MeshConfig
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.optimizer import schedule
from hybrid_jax.train.step import abstract_state, compile_step, make_program, microbatches, split, state_bytes
from tests.helpers import relative_error, tree_errors
from tests.hybrid_jax.train_runs import random_batch, small_run

ONE = MeshConfig(fsdp=1)


def one_device():
    return make_mesh(ONE, jax.devices()[:1])


def train(run, mesh, program=None, steps=3):
    """The state, every step's metrics, and how often the step was compiled."""
    program = program or make_program(run, mesh)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0))
        history = []
        for seed in range(steps):
            state, metrics = program.step(state, random_batch(seed, run, mesh))
            history.append(jax.device_get(metrics))
    return state, history, program.step._cache_size()


@pytest.fixture(scope="module")
def program():
    """The program of ``small_run()`` on one device: compiled once for all tests that use it."""
    return make_program(small_run(), one_device())


@pytest.fixture(scope="module")
def whole_batch(program):
    return train(small_run(), one_device(), program)


@pytest.mark.parametrize(
    ("microbatch", "sizes"),
    [(2, None), (1, dict(data=2, fsdp=2, tensor=2)), (4, dict(data=1, fsdp=2, seq=2, tensor=2))],
)
def test_microbatches_and_meshes_change_nothing_but_rounding(whole_batch, microbatch, sizes):
    state, history, compiled = train(small_run(train={"microbatch": microbatch}), make_mesh(MeshConfig(**sizes)) if sizes else one_device())
    expected_state, expected_history, _ = whole_batch
    assert compiled == 1
    for metrics, expected in zip(history, expected_history, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "total_by_position", "weight_by_position"):
            assert relative_error(getattr(metrics, name), getattr(expected, name)) < 1e-5, name
    # Adam divides by the gradient's own size, so rounding shows most where gradients are smallest
    assert max(tree_errors(state.params, expected_state.params).values()) < 1e-3


def test_the_loss_and_gradient_are_those_of_all_tokens_together(program, whole_batch):
    batch = random_batch(0, small_run())

    def mean_loss(params):
        logits = nnx.merge(program.graph, params)(batch["tokens"], batch["segment_ids"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(program.init(jax.random.key(0)).params)
    metrics = whole_batch[1][0]
    assert relative_error(metrics.loss, loss) < 1e-6
    assert relative_error(metrics.grad_norm, optax.tree.norm(gradient)) < 1e-5


def test_the_same_steps_give_the_same_bits(program, whole_batch):
    state, history, _ = train(small_run(), one_device(), program)
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole_batch[0]), strict=True))
    assert [metrics.loss for metrics in history] == [metrics.loss for metrics in whole_batch[1]]


@pytest.mark.parametrize("bad", ["infinite weights", "no weights at all"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(program, bad):
    run = small_run()
    state, metrics = program.step(program.init(jax.random.key(0)), random_batch(0, run))
    rate = metrics.learning_rate
    broken = random_batch(1, run)
    broken["weights"] = np.full_like(broken["weights"], np.inf if bad == "infinite weights" else 0)
    before = jax.device_get(state)
    for n in (1, 2):
        state, metrics = program.step(state, broken)
        assert not np.isfinite(metrics.loss)
        assert (metrics.skipped, metrics.skipped_in_a_row) == (n, n)
    for name in ("params", "opt_state"):
        same = jax.tree.map(np.array_equal, jax.device_get(getattr(state, name)), getattr(before, name))
        assert all(jax.tree.leaves(same)), name
    assert state.step == 3
    state, metrics = program.step(state, random_batch(2, run))
    assert np.isfinite(metrics.loss) and (metrics.skipped, metrics.skipped_in_a_row) == (2, 0)
    rates = schedule(run.optimizer, run.train.steps)
    assert (rate, metrics.learning_rate) == (rates(0), rates(1))  # the schedule went on by one step, not by three
    assert not jnp.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(before.params)[0])


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(program):
    """As in bfloat16, where the backward pass is the first to overflow: here squares of the gradient do."""
    run = small_run()
    state = program.init(jax.random.key(0))
    state.params["output"]["kernel"].set_value(1e25 * state.params["output"]["kernel"].get_value())
    before = jax.device_get(state)
    state, metrics = program.step(state, random_batch(0, run))
    assert np.isfinite(metrics.loss) and not np.isfinite(metrics.grad_norm) and metrics.skipped == 1
    for name in ("params", "opt_state"):
        same = jax.tree.map(np.array_equal, jax.device_get(getattr(state, name)), getattr(before, name))
        assert all(jax.tree.leaves(same)), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "schedule_free"])
def test_the_optimizer_lies_as_its_parameters(optimizer):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state = abstract_state(small_run(optimizer={"name": optimizer}), mesh).state

    def layouts(tree):
        return Counter((x.shape, x.sharding.spec) for x in jax.tree.leaves(tree) if x.size > 3)

    copies = {"adamw": 2, "muon": None, "schedule_free": 2}[optimizer]  # Muon keeps one of its matrices and two of the rest
    of_params, of_optimizer = layouts(state.params), layouts(state.opt_state)
    assert any("fsdp" in spec and "tensor" in spec for _, spec in of_params)
    assert of_params.keys() == of_optimizer.keys()
    for layout, count in of_params.items():
        assert of_optimizer[layout] == copies * count if copies else of_optimizer[layout] in (count, 2 * count)


def test_muon_trains_on_a_mesh():
    run = small_run(optimizer={"name": "muon"})
    sharded = train(run, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    single = train(run, one_device())
    assert sharded[2] == 1
    for a, b in zip(sharded[1], single[1], strict=True):
        assert relative_error(a.loss, b.loss) < 1e-4


def test_the_compiled_step_says_what_it_holds(program):
    run = small_run()
    compiled, held = compile_step(program, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch(0, run)))
    size = state_bytes(program.state)
    assert size < held < 100 * size
    state, metrics = compiled(program.init(jax.random.key(0)), random_batch(0, run))
    assert np.isfinite(metrics.loss) and state.step == 1


def test_microbatches_take_every_row_once_and_none_from_another_device():
    rows = jnp.arange(24)[:, None]
    cut = split({"tokens": rows}, 3)["tokens"]
    assert cut.shape == (3, 8, 1)
    assert sorted(cut.ravel().tolist()) == list(range(24))
    for device in range(4):  # of 24 rows over 4 devices, and 8 over the same 4
        assert set(cut[:, 2 * device : 2 * device + 2].ravel().tolist()) == set(range(6 * device, 6 * device + 6))


@pytest.mark.parametrize(
    ("train_config", "window", "sizes", "expected"),
    [
        ({"batch": 12}, 16, dict(fsdp=8), "choose a multiple of 8"),
        ({"batch": 24, "microbatch": 2}, 16, dict(fsdp=8), "choose train.microbatch=1"),
        ({"batch": 8}, 15, dict(fsdp=4, seq=2), "give a multiple of 2"),
    ],
)
def test_what_the_mesh_cannot_hold_is_refused_with_a_way_out(train_config, window, sizes, expected):
    run = small_run(train=train_config, data={"window": window})
    with pytest.raises(ConfigError, match=expected):
        microbatches(run, make_mesh(MeshConfig(**sizes)))


def test_a_microbatch_larger_than_a_device_has_is_the_whole_of_it():
    assert microbatches(small_run(train={"batch": 16, "microbatch": 100}), make_mesh(MeshConfig(fsdp=8))) == 1
    assert microbatches(small_run(train={"batch": 64, "microbatch": 2}), make_mesh(MeshConfig(fsdp=8))) == 4
