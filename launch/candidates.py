"""Ways to lay one training run out on a pod that change how fast it is and not what it computes: meshes, remat policies, microbatches."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from hybrid_jax.chips import CHIPS
from hybrid_jax.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from hybrid_jax.sharding import AXES, mesh_shape
from hybrid_jax.train.step import abstract_state, microbatches
from hybrid_jax.train.throughput import training_flops
from launch.ahead import capacity, devices, held_state
from launch.chips import LINKS, Links
from launch.topologies import Target

REMAT = typing.get_args(typing.get_type_hints(ModelConfig)["remat"])  # each holds less than the one before, and computes more again
COMPUTED = dict(zip(REMAT, (1.0, 1.1, 4 / 3), strict=True))  # FLOPs for one of the model's, about


class Candidate(NamedTuple):
    config: RunConfig
    known_bytes: int  # that a device holds of state, batch and the input of every block
    guess_s: float  # a rough one, to begin with what is likely

    @property
    def mesh(self) -> MeshConfig:
        return self.config.mesh

    def holds_more(self, other: "Candidate") -> bool:
        """Whether it surely holds as much as ``other`` and more."""
        mine, its = ((REMAT.index(one.config.model.remat), one.config.train.microbatch) for one in (self, other))
        return self.mesh == other.mesh and self != other and mine[0] <= its[0] and mine[1] >= its[1]


class Found(NamedTuple):
    likely: list[Candidate]  # best guess first
    too_large: list[Candidate]  # by what is known before compiling
    impossible: int  # meshes that the run cannot be dealt out on


def find(config: RunConfig, target: Target) -> Found:
    """All that can be tried of a run on a target. Raises ConfigError where no mesh is possible, with the last reason."""
    count = devices(target)
    state = abstract_state(config, AbstractMesh((1,) * len(AXES), AXES)).state
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    model_s = training_flops(config) / count / CHIPS[target.kind].flop_per_s
    fitting, too_large, impossible, reason = [], [], 0, None
    for mesh in _meshes(config.mesh, count):
        try:
            shape = mesh_shape(mesh, count, target.slices)
            on = AbstractMesh(tuple(shape.values()), AXES)
            variants = list(_variants(dataclasses.replace(config, mesh=mesh), on))
            held = sum(held_state(config, on, state).values())
        except ConfigError as error:
            impossible, reason = impossible + 1, error
            continue
        for variant in variants:
            known = held + _block_inputs(variant)
            candidate = Candidate(variant, known, _guess(variant, model_s, parameters, LINKS[target.kind]))
            (fitting if known <= capacity(target) else too_large).append(candidate)
    if not fitting and not too_large:
        raise reason
    return Found(sorted(fitting, key=lambda one: (one.guess_s, one.known_bytes)), too_large, impossible)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _meshes(given: MeshConfig, count: int) -> Iterator[MeshConfig]:
    """All that use every device; ``seq`` stays as it is given."""
    seq = max(given.seq, 1)
    for tensor in _divisors(count // seq):
        for data in _divisors(count // seq // tensor):
            yield MeshConfig(data, count // seq // tensor // data, seq, tensor)


def _variants(config: RunConfig, mesh: AbstractMesh) -> Iterator[RunConfig]:
    """Of a run on a mesh. Raises ConfigError where its batch or window cannot be dealt out."""
    rows = config.train.batch // (config.mesh.data * config.mesh.fsdp) or 1
    for microbatch in _divisors(rows):
        train = dataclasses.replace(config.train, microbatch=microbatch)
        for remat in REMAT:
            variant = dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, remat=remat))
            microbatches(variant, mesh)
            yield variant


def _held_tokens(config: RunConfig) -> int:
    return config.train.microbatch * config.data.window // config.mesh.seq


def _block_inputs(config: RunConfig) -> int:
    """Bytes of what every policy keeps for the backward pass."""
    return config.model.layers * _held_tokens(config) * config.model.width * jax.numpy.dtype(config.model.dtype).itemsize


def _guess(config: RunConfig, model_s: float, parameters: int, links: Links) -> float:
    """Seconds of a step if weights are gathered for each pass and microbatch, and gradients and activations summed likewise.

    model_s: of the model's own FLOPs at the chips' peak. parameters: how many the model has.
    """
    mesh, model = config.mesh, config.model
    itemsize = jax.numpy.dtype(model.dtype).itemsize
    parameters = parameters / mesh.tensor
    accumulated = config.train.batch // (mesh.data * mesh.fsdp) // config.train.microbatch
    passes = 2 if model.remat == "none" else 3
    sent = (mesh.fsdp > 1) * accumulated * (passes * itemsize + 4) * parameters
    sent += (mesh.data > 1) * accumulated * 8 * parameters / mesh.fsdp
    sent += (mesh.tensor > 1) * accumulated * passes * 4 * model.layers * _held_tokens(config) * model.width * itemsize
    return max(COMPUTED[model.remat] * model_s, links.devices * sent / (2 * links.link_rate))
