"""The mesh, and the one table that says how parameters and activations lie on it.

Every parameter names its axes (``nnx.Param(..., axes=("embed", "heads"))``); :data:`RULES` maps those names to the axes
of the mesh. Nothing else in the library knows about devices. Batches lie over ``data`` and ``fsdp``, their time axis over
``seq``; ``fsdp`` also splits parameters, ``tensor`` splits heads, MLP and vocabulary.
"""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_jax.config import ConfigError, MeshConfig

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


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of ``config`` over ``devices`` (default: all). Raises ConfigError where the sizes do not use every device."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest, remainder = divmod(len(devices), fixed)
    if remainder or (rest != 1 and -1 not in sizes.values()):
        shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(f"mesh {shown} does not fit {len(devices)} devices; the sizes must multiply to {len(devices)} (-1: the rest)")
    shape = tuple(rest if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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
                raise ConfigError(
                    f"mesh {RULES[axis]}={mesh.shape[RULES[axis]]} does not divide the {axis!r} axis of size {size} of "
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='.')}; choose a size that does"
                )
        return NamedSharding(mesh, spec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, params, logical_axes(params))
