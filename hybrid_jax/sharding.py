"""The mesh, and the one table that says how parameters and activations lie on it.

Every parameter names its axes (``nnx.Param(..., axes=("embed", "heads"))``); :data:`RULES` maps those names to the axes
of the mesh. Nothing else in the library knows about devices. Batches lie over ``data`` and ``fsdp``, their time axis over
``seq``; ``fsdp`` also splits parameters, ``tensor`` splits heads, MLP and vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_jax.amounts import count
from hybrid_jax.config import ConfigError, MeshConfig
from pallas_kernels.attention import attention, attention_stretch
from pallas_kernels.causal_conv import causal_conv, causal_conv_stretch
from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_stretch
from pallas_kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_stretch
from pallas_kernels.linear_scan import linear_scan, linear_scan_stretch

AXES = ("data", "fsdp", "seq", "tensor")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "seq",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocabulary": "tensor",
    "layers": None,  # the stacked axes of a scan
    "rank": None,  # the inner width of a low-rank projection
    "taps": None,  # of a short convolution
    None: None,
}


def mesh_shape(config: MeshConfig, devices: int, slices: int = 1) -> dict[str, int]:
    """Axis -> size of the mesh of ``config`` over so many devices in so many slices.

    Raises ConfigError where the sizes do not use every device, or the slices cannot be parts of the ``data`` axis.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest, remainder = divmod(devices, fixed)
    if remainder or (rest != 1 and -1 not in sizes.values()):
        shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(f"mesh {shown} does not fit {count(devices, 'device')}; the sizes must multiply to {devices} (-1: the rest)")
    shape = {axis: rest if size == -1 else size for axis, size in sizes.items()}
    if shape["data"] % slices:
        raise ConfigError(f"mesh.data={shape['data']} cannot be dealt to {slices} slices; give --config.mesh.data={slices}, or a multiple")
    return shape


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of ``config`` over ``devices`` (default: all), axes along the links between them where that can be.

    Several slices, which only a slower network connects, are the outer part of the ``data`` axis. Raises ConfigError as
    :func:`mesh_shape` does.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    shape = mesh_shape(config, len(devices), slices)
    if slices == 1:
        placed = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    else:
        within, across = shape | {"data": shape["data"] // slices}, dict.fromkeys(AXES, 1) | {"data": slices}
        sizes = tuple(within.values()), tuple(across.values())
        placed = mesh_utils.create_hybrid_device_mesh(*sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(*axes: str | None) -> P:
    """The PartitionSpec of an array whose axes have these logical names."""
    return P(*(RULES[axis] for axis in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch's [B,T] arrays."""
    return NamedSharding(mesh, spec("batch", "time"))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's layout by logical names, where a mesh is set (``jax.set_mesh``) and has more than one device."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


class Dealt(NamedTuple):
    """How an operator is dealt over devices: what computes a stretch of its sequence, and its states' logical axes."""

    stretch: Callable
    state: tuple[str | None, ...] = ("batch", "heads")


DEALT = {
    linear_scan: Dealt(linear_scan_stretch),
    gated_linear_attention: Dealt(gated_linear_attention_stretch),
    gated_delta_rule: Dealt(gated_delta_rule_stretch),
    causal_conv: Dealt(causal_conv_stretch, ("batch", None, "heads")),
    attention: Dealt(attention_stretch),
}


def on_each_device(operator: Callable, *arrays: jax.Array, **named) -> Any:
    """An operator of :data:`DEALT`, each device of the mesh in force computing its own rows, heads and stretch of time: XLA cannot
    partition a kernel by itself.

    arrays: [B,T,H,...] or [B,T,D]; [H] or [D,W] for what is the same at all tokens.
    named: ``log_decay``, shaped as those, ``segment_ids`` [B,T] and ``initial_state``, each may be None; and what else the operator takes.
    Returns what the operator does: [B,T,...], beside it may be a state. What does not divide over the mesh, rows, heads or tokens, is
    computed on all of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return operator(*arrays, **named)

    def dividing(name, sizes):
        parts = RULES[name]
        return parts if all(size % mesh_size(mesh, parts) == 0 for size in sizes) else None

    parts = {
        None: None,
        "batch": dividing("batch", [arrays[0].shape[0]]),
        "time": dividing("time", [arrays[0].shape[1]]),
        "heads": dividing("heads", [x.shape[2] if x.ndim > 2 else x.shape[0] for x in arrays]),
    }
    stretch, state_axes = DEALT[operator]
    dealt = partial(stretch, axis_name=parts["time"]) if mesh_size(mesh, parts["time"]) > 1 else operator
    sequence, state = P(parts["batch"], parts["time"], parts["heads"]), P(*(parts[axis] for axis in state_axes))

    def spec_of(x):
        return P(parts["heads"]) if x is not None and x.ndim < 3 else sequence

    named_specs = {"segment_ids": P(parts["batch"], parts["time"]), "initial_state": state, "log_decay": spec_of(named.get("log_decay"))}
    sharded = {name: named.pop(name) for name in named_specs if named.get(name) is not None}

    in_specs = map(spec_of, arrays)
    is_pair = isinstance(jax.eval_shape(lambda sharded, *arrays: operator(*arrays, **sharded, **named), sharded, *arrays), tuple)

    def run(sharded, *arrays):
        return dealt(*arrays, **sharded, **named)

    # Not checked: kernels do not say over which axes what they compute varies.
    out_specs = (sequence, state) if is_pair else sequence
    in_specs = {name: named_specs[name] for name in sharded}, *in_specs
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)(sharded, *arrays)


def mesh_size(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along some axes of a mesh together."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def is_whole(axis: str) -> bool:
    """Whether each device of the mesh in force has all of an axis, given by its logical name, of an array."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size <= 1 or mesh_size(mesh, RULES[axis]) == 1


def logical_axes(params: nnx.State) -> Any:
    """The tree of ``params`` with each array replaced by the tuple of its axes' names, stacked axes ("layers") included."""

    def names(param: nnx.Param) -> nnx.Param:
        axes = param.get_metadata("axes")
        return param.replace(("layers",) * (len(param.shape) - len(axes)) + axes)

    return jax.tree.map(names, params, is_leaf=lambda x: isinstance(x, nnx.Param))


def param_shardings(mesh: Mesh, params: nnx.State) -> Any:
    """The tree of ``params`` with each array replaced by its NamedSharding. Raises ConfigError where a size does not divide."""

    def sharding(path, array, axes) -> NamedSharding:
        for size, axis in zip(array.shape, axes, strict=True):
            if RULES[axis] and size % mesh.shape[RULES[axis]]:
                whole = ", or --config.mesh.data=-1 --config.mesh.fsdp=1: each device then has all of it" if axis == "embed" else ""
                raise ConfigError(
                    f"mesh {RULES[axis]}={mesh.shape[RULES[axis]]} does not divide the {axis!r} axis of size {size} of "
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='.')}; choose a size that does{whole}"
                )
        return NamedSharding(mesh, spec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, params, logical_axes(params))
