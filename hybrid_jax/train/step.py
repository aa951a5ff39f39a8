"""The training step: gradients accumulated over microbatches, clipped, applied if finite; and the state it carries."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_jax.config import ConfigError, RunConfig
from hybrid_jax.loss import Losses, batch_losses
from hybrid_jax.model import abstract, initialize
from hybrid_jax.sharding import batch_sharding, constrain, param_shardings
from hybrid_jax.train.optimizer import make_optimizer, schedule


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    params: nnx.State
    opt_state: Any
    step: jax.Array  # [] int32, steps taken, those skipped included
    skipped: jax.Array  # [] int32, steps whose gradient was not finite
    skipped_in_a_row: jax.Array  # [] int32, of them, those since the last good step


class StepMetrics(NamedTuple):
    """What a step reports; arrays on the device, fetched when the next step is under way."""

    loss: jax.Array  # [] nats a token, weighted
    grad_norm: jax.Array  # [] before clipping
    learning_rate: jax.Array  # []
    skipped: jax.Array  # [] int32, so far
    skipped_in_a_row: jax.Array  # [] int32
    total_by_position: jax.Array  # [T] sum of weighted losses
    weight_by_position: jax.Array  # [T] sum of weights


class Abstract(NamedTuple):
    """A run's model and optimiser without a number in them."""

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState  # of ShapeDtypeStructs, with the shardings of a mesh


class Program(NamedTuple):
    """A run's training on one mesh, as functions to compile and the shapes to compile them for."""

    graph: nnx.GraphDef
    state: TrainState  # of ShapeDtypeStructs with their shardings
    init: Callable[[jax.Array], TrainState]  # key -> state, each device drawing its own part
    begin: Callable[[nnx.State], TrainState]  # the state before the first step, of given parameters (donated)
    step: Callable[[TrainState, dict], tuple[TrainState, StepMetrics]]  # the state is donated


def microbatches(config: RunConfig, mesh: Mesh) -> int:
    """How many times a step accumulates. Raises ConfigError where the batch or the window cannot be dealt out on the mesh."""
    rows, microbatch = config.train.batch, config.train.microbatch
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % devices:
        raise ConfigError(
            f"train.batch={rows} cannot be dealt to data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']} = {devices} devices; "
            f"choose a multiple of {devices}, or another mesh"
        )
    held = min(microbatch, rows // devices)
    if rows // devices % held:
        divisors = [n for n in range(1, microbatch + 1) if rows // devices % n == 0]
        raise ConfigError(
            f"train.microbatch={microbatch} does not divide the {rows // devices} sequences a device has at each step "
            f"(train.batch={rows} on {devices}); choose train.microbatch={divisors[-1]}"
        )
    if config.data.window % mesh.shape["seq"]:
        parts = mesh.shape["seq"]
        raise ConfigError(f"data.window={config.data.window} cannot be cut into mesh.seq={parts} equal parts; give a multiple of {parts}")
    return rows // devices // held


def abstract_state(config: RunConfig, mesh: Mesh) -> Abstract:
    """The state of a run as shapes laid out on ``mesh``. Raises ConfigError where a parameter cannot be cut as the mesh asks."""
    graph, params = abstract(config.model)
    optimizer = make_optimizer(config.optimizer, config.train.steps, params)
    # the key is made inside: the mesh in force may be of devices that are not there
    shapes = jax.eval_shape(lambda: _initial(config, optimizer)(jax.random.key(0)))
    shardings = state_shardings(mesh, shapes)
    return Abstract(graph, optimizer, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings))


def make_program(config: RunConfig, mesh: Mesh) -> Program:
    """The training program of ``config`` on ``mesh``; nothing is allocated. Raises ConfigError for what the mesh cannot hold."""
    accumulate = microbatches(config, mesh)
    graph, optimizer, state = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(graph, optimizer, schedule(config.optimizer, config.train.steps), accumulate)
    return Program(
        graph,
        state,
        jax.jit(_initial(config, optimizer), out_shardings=shardings),
        jax.jit(partial(_begin, optimizer), out_shardings=shardings, donate_argnums=0),
        # one sharding in and out: what a step returns is what the next one takes, and it is compiled once
        jax.jit(
            step,
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, NamedSharding(mesh, P())),
            donate_argnums=0,
        ),
    )


def _initial(config: RunConfig, optimizer: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
    def init(key: jax.Array) -> TrainState:
        return _begin(optimizer, initialize(config.model, key))

    return init


def _begin(optimizer: optax.GradientTransformation, params: nnx.State) -> TrainState:
    return TrainState(params, optimizer.init(params), *(jnp.zeros((), jnp.int32) for _ in range(3)))


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """The NamedSharding of every array of a state: those of an optimiser lie as the parameters they belong to, scalars everywhere."""
    replicated = NamedSharding(mesh, P())
    params = param_shardings(mesh, state.params)
    leaves = jax.tree.structure(state.params).flatten_up_to(params)
    by_path = {path: sharding for (path, _), sharding in zip(jax.tree_util.tree_leaves_with_path(state.params), leaves, strict=True)}

    def of(path, _) -> NamedSharding:  # an optimiser's trees repeat the parameters' paths below their own
        return next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), replicated)

    return jax.tree_util.tree_map_with_path(of, state)


def make_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, learning_rate: optax.Schedule, accumulate: int):
    """(state, batch) -> (state, metrics), a pure function to be jitted.

    The gradient is that of (sum of weighted losses) / (sum of weights) over the whole batch, however many microbatches it
    is cut into. A step whose loss or gradient is not finite changes nothing but the counters.
    """

    def losses(params: nnx.State, batch: dict) -> tuple[jax.Array, Losses]:
        sums = batch_losses(nnx.merge(graph, params), batch)
        return sums.total, sums

    def step(state: TrainState, batch: dict) -> tuple[TrainState, StepMetrics]:
        params = state.params

        def add(sums, microbatch):
            (_, one), gradient = jax.value_and_grad(losses, has_aux=True)(params, microbatch)
            return jax.tree.map(jnp.add, sums, (gradient, one)), None

        T = batch["tokens"].shape[1]
        zeros = Losses(*(jnp.zeros(shape, jnp.float32) for shape in ((), (), (T,), (T,), ())))
        (gradient, sums), _ = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), zeros), split(batch, accumulate))
        gradient = jax.tree.map(lambda g: g / sums.weight, gradient)
        loss = sums.total / sums.weight

        grad_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, params)
        new = optax.apply_updates(params, updates), opt_state
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (params, state.opt_state))

        rate = learning_rate(state.step - state.skipped)  # the optimiser counts the steps it took
        skipped = state.skipped + ~finite
        skipped_in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        metrics = StepMetrics(loss, grad_norm, rate, skipped, skipped_in_a_row, sums.total_by_position, sums.weight_by_position)
        return TrainState(params, opt_state, state.step + 1, skipped, skipped_in_a_row), metrics

    return step


def split(batch: dict, n: int) -> dict:
    """Cut a batch's [B,T] arrays into n microbatches, [n, B/n, T], every n-th row to one, so that no row changes device."""

    def cut(x):
        return constrain(x.reshape(x.shape[0] // n, n, x.shape[1]).swapaxes(0, 1), None, "batch", "time")

    return jax.tree.map(cut, batch)


def compile_step(program: Program, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[Callable, int]:
    """(the compiled step, the bytes it holds at once on each device: state, batch and everything in between)."""
    compiled = program.step.lower(program.state, batch).compile()
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return compiled, memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


def state_bytes(state: TrainState) -> int:
    """Bytes of a state (or of its shapes), over all devices."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
