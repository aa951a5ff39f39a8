"""The training step of a run, compiled for chips that are not there: what a device holds, computes, moves and sends in a step.

The compiler is loaded by the process that calls :func:`compile_ahead`, one of :func:`compiler`. What is impossible is told by
:func:`check` before.
"""

import contextlib
import importlib.metadata
import math
import re
import time
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from experiments.compiled import gpu_topology, hlo, tpu_topology
from experiments.compiled.collectives import collectives, total
from experiments.compiled.flops import flops
from experiments.compiled.process import Process
from hybrid_jax.chips import CHIPS
from hybrid_jax.config import RunConfig
from hybrid_jax.sharding import AXES, make_mesh, mesh_shape
from hybrid_jax.train.advice import implementations_of
from hybrid_jax.train.feed import batch_shapes
from hybrid_jax.train.step import abstract_state, compile_step, make_program, microbatches, state_shardings
from hybrid_jax.train.throughput import training_flops
from launch.chips import LINKS, Place, network
from launch.topologies import Hosts, Target

QUICK = -1.0  # of a row: XLA's least effort, a quarter of a run's time to compile; 0 is a run's own
# libtpu's two ways to say so, before and after it has placed every array.
_SIZE = r"([\d.]+)([KMGT])"
_NO_ROOM = [re.compile(rf"Used {_SIZE} of {_SIZE} hbm"), re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")]


def devices(target: Target) -> int:
    """That JAX makes of a target's chips."""
    return target.chips * LINKS[target.kind].devices


def capacity(target: Target) -> int:
    """Bytes of memory of a device."""
    return CHIPS[target.kind].memory_bytes


def compiler(target: Target) -> contextlib.AbstractContextManager[Process]:
    """A process for :func:`compile_ahead`. Raises ConfigError where the compiler is not installed."""
    if isinstance(target, Hosts):
        return contextlib.closing(Process(gpu_topology.COMPILER, gpu_topology.environment()))
    return contextlib.closing(Process(tpu_topology.COMPILER, tpu_topology.environment(target.name)))


def check(config: RunConfig, target: Target) -> dict[str, int]:
    """The shape of the run's mesh on the target. Raises ConfigError where mesh, batch, window and parameters cannot be dealt out on it."""
    shape = mesh_shape(config.mesh, devices(target), target.slices)
    mesh = AbstractMesh(tuple(shape.values()), AXES)
    microbatches(config, mesh)
    abstract_state(config, mesh)
    return shape


def held_state(config: RunConfig, mesh: Mesh | AbstractMesh, state: Any) -> dict[str, int]:
    """Bytes that a device of ``mesh`` holds from step to step, of the shapes of a state, and of a step's batch."""

    def held(tree, shardings) -> int:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in pairs)

    shardings, batch = state_shardings(mesh, state), batch_shapes(config, mesh)
    return {
        "parameters": held(state.params, shardings.params),
        "optimizer": held(state.opt_state, shardings.opt_state),
        "batch": held(batch, {name: x.sharding for name, x in batch.items()}),
    }


def identity(config: RunConfig, target: Target) -> dict[str, Any]:
    """Of a row: what is compiled, for what."""
    return {
        "topology": target.name,
        "slices": target.slices,
        "mesh": mesh_shape(config.mesh, devices(target), target.slices),
        "batch": config.train.batch,
        "microbatch": config.train.microbatch,
        "window": config.data.window,
        "remat": config.model.remat,
    }


def compile_ahead(config: RunConfig, target: Target, effort: float) -> dict[str, Any]:
    """Compile a run's step for a target: what its row says of it. Only ``no_room`` and the state where it does not fit."""
    if isinstance(target, Hosts):
        placed = gpu_topology.devices(f"gpu:{target.kind}", target.hosts, target.cards)
        by = {"plugin": importlib.metadata.version("jax-cuda13-plugin")}
    else:
        placed = tpu_topology.devices(target.name, target.slices)
        by = {"libtpu": importlib.metadata.version("libtpu")}
    mesh = make_mesh(config.mesh, placed)
    row = {"device": placed[0].device_kind, "effort": effort} | by
    jax.config.update("jax_optimization_level", "O0" if effort == QUICK else "UNKNOWN")
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        program = make_program(config, mesh)
        row["held"] = held_state(config, mesh, program.state)
        try:
            compiled, held = compile_step(program, batch_shapes(config, mesh))
        except jax.errors.JaxRuntimeError as error:
            if (sizes := no_room(str(error))) is None:
                raise
            return row | {"compile_s": time.perf_counter() - start, "no_room": sizes}
        row["compile_s"] = time.perf_counter() - start
    if held > (room := capacity(target)):  # which XLA does not mind where the chip is a GPU
        return row | {"no_room": (held, room)}
    return row | _held(row["held"], compiled, held) | _work(config, target, mesh, compiled.as_text(), effort, row["held"])


def no_room(message: str) -> tuple[float, float] | None:
    """Bytes of HBM that a step needs and a device has, as the compiler says where it does not fit; None where it says something else."""
    match = next(filter(None, (form.search(message) for form in _NO_ROOM)), None)
    if match is None:
        return None
    number, unit, of, of_unit = match.groups()
    return float(number) * 1024 ** (1 + "KMGT".index(unit)), float(of) * 1024 ** (1 + "KMGT".index(of_unit))


def _held(state: dict[str, int], compiled, held: int) -> dict[str, Any]:
    program = compiled.memory_analysis().generated_code_size_in_bytes
    return {"held_bytes": held + program, "held": state | {"temporaries": held - sum(state.values()), "program": program}}


def _work(config: RunConfig, target: Target, mesh: Mesh, text: str, effort: float, state: dict[str, int]) -> dict[str, Any]:
    """What a device computes, moves and sends, and how long each takes at the least."""
    chip, module, shape = CHIPS[target.kind], hlo.Module(text), dict(mesh.shape)
    found = collectives(module, mesh.size)
    computed, model = flops(module, config.model.full_attention.window), training_flops(config) / mesh.size
    if effort == QUICK:  # fuses less than a run does: only what no fusion saves, state and batch read and state written
        moved = sum(state.values()) + state["parameters"] + state["optimizer"]
    else:
        moved = module.hbm_bytes
    seconds = {"FLOPs": max(computed, model) / chip.flop_per_s, "HBM": moved / chip.bytes_per_s}
    seconds |= network(LINKS[target.kind], target.sizes, Place.of(mesh.devices.flat), found, shape)
    return {
        "flops": computed,
        "model_flops": model,
        "hbm_bytes": moved,
        "collectives": total(found, shape),
        "seconds": seconds,
        "step_s": max(seconds.values()),
        "mfu": model / chip.flop_per_s / max(seconds.values()),
        "unknown_loops": sum(not execution.known for execution in module.executions),
        "implementations": implementations_of(config.model, text),
    }
