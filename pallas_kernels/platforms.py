"""Which code runs where: decided by the mesh in force, or else when a program is lowered, for the platform that it is lowered for.

The local device says nothing about that: a program may be exported, or compiled ahead of time for a pod, on a machine
without an accelerator. So without a mesh implementations are chosen inside the program (:func:`by_platform`). What a kernel has to
know of the chip while it is traced (how large a block may be) comes from the mesh as well.
"""

import math
import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir

# What JAX calls a TPU of each generation.
GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
HOPPER = r"NVIDIA G?H\d"  # H100, H200, GH200
LARGEST_AXIS = 65535  # of a launch on a GPU, but for the first axis, which has 2**31 - 1
ONE_AXIS = "program"  # of grids with longer ones
_GRID: ContextVar[dict[str, tuple[int, int]] | None] = ContextVar("grid", default=None)  # (size, stride) of the axes that are one


def generation() -> str | None:
    """The generation a program is traced for: of TPUs, such as "v5e", or "hopper" (H100, H200, GH200); None for any other device.

    The devices of the mesh in force (``jax.set_mesh``) decide, be they attached or those of an ahead-of-time topology;
    without a mesh, the local device. Both are part of what ``jax.jit`` caches by.
    """
    kind = _device().device_kind
    return "hopper" if re.match(HOPPER, kind) else GENERATIONS.get(kind)


def platform() -> str:
    """What a program is traced for, "tpu", "gpu" or "cpu"; the device is that of :func:`generation`."""
    return _device().platform


def kernels(tpu: ModuleType, gpu: ModuleType) -> ModuleType:
    """The one of an operator's two modules of kernels that is for the generation in force: ``gpu`` for Hopper, else ``tpu``."""
    return gpu if generation() == "hopper" else tpu


def cores() -> int:
    """TensorCores of the device a program is traced for, which share the parallel axes of a kernel's grid."""
    return {"v4": 2, "v5p": 2}.get(generation(), 1)


def multiprocessors() -> int:
    """Of the Hopper GPU that a program is traced for; of one that is not there, those of an H100 or H200 (SXM)."""
    device = _device()
    found = getattr(device, "core_count", None) or getattr(device, "num_cores", None)  # an abstract mesh's
    return found if found and re.match(HOPPER, device.device_kind) else 132


def is_partitioned() -> bool:
    """Whether XLA partitions the program over the mesh in force, which it cannot do with a kernel: only ``shard_map`` can."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 and kind != jax.sharding.AxisType.Manual for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True))


def by_platform(*arrays, default: Callable, **branches: Callable):
    """``jax.lax.platform_dependent``, but where a mesh in force says what the platform is, its branch alone is traced.

    branches: by "cpu", "tpu", "cuda".
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.lax.platform_dependent(*arrays, default=default, **branches)
    return branches.get("cuda" if device.platform == "gpu" else device.platform, default)(*arrays)


def on_accelerator(kernel: Callable, elsewhere: Callable) -> Callable:
    """A function that is ``kernel`` on a TPU, or where it is traced for a Hopper GPU, and else ``elsewhere``: see :func:`by_platform`.

    Both take the same arguments: trees of arrays, and values that are not arrays, which both are given as they are.
    """

    def run(*arguments):
        leaves, tree = jax.tree.flatten(arguments)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

        def filled(function):
            def call(*arrays):
                rest = iter(arrays)
                return function(*tree.unflatten(next(rest) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)))

            return call

        arrays = [leaf for leaf, a in zip(leaves, is_array, strict=True) if a]
        platform = "cuda" if generation() == "hopper" else "tpu"
        return by_platform(*arrays, **{platform: filled(kernel)}, default=filled(elsewhere))

    return run


def kernel(name: str, run: Callable[..., object]) -> Callable:
    """``run(*arrays, interpret=)``, which contains Mosaic TPU kernels: compiled for TPU, interpreted on CPU, as :func:`by_platform` says.

    Lowered for any other platform it raises NotImplementedError with the kernel's name.
    """

    def call(*arrays):
        def refuse(*arrays):
            jaxpr, results = jax.make_jaxpr(interpreted, return_shape=True)(*arrays)
            return jax.tree.unflatten(jax.tree.structure(results), _refusal.bind(name=name, shapes=tuple(jaxpr.out_avals)))

        compiled, interpreted = partial(run, interpret=False), partial(run, interpret=True)
        return by_platform(*arrays, tpu=compiled, cpu=interpreted, default=refuse)

    return call


def pallas_call(body: Callable, *, name: str, out_shape: tuple[jax.ShapeDtypeStruct, ...], **keywords) -> Callable:
    """``pl.pallas_call`` of a Mosaic TPU kernel, as a :func:`kernel`; keywords as there.

    The results vary over the axes of a mesh that the operands vary over, as ``shard_map`` wants to know.
    """

    def run(*operands, interpret):
        operands = [_vary(a, _varying(operands)) for a in operands]
        axes = jax.typeof(operands[0]).manual_axis_type
        shapes = tuple(jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=axes) for s in out_shape)
        return pl.pallas_call(body, name=name, out_shape=shapes, interpret=interpret, **keywords)(*operands)

    return kernel(name, run)


def gpu_call(body: Callable, *, name: str, out_type: tuple[jax.ShapeDtypeStruct, ...], grid, grid_names, **keywords) -> Callable:
    """``plgpu.kernel``, a Mosaic GPU kernel, whose results vary over the axes of a mesh as its operands do; keywords as there.

    Its body asks :func:`gpu_index` where in the grid it is, whose axes may be of any length. Inside of it nothing varies but what is read
    from an operand: a loop's carry must not begin with that as it is.
    """
    # CUDA's second and third axis, JAX's last but one and all before it together, are shorter than its first.
    folded = max(math.prod(grid[:-2]), *grid[-2:-1], 0) > LARGEST_AXIS

    def in_one_axis(*refs):
        token = _GRID.set(dict(zip(grid_names, zip(grid, _strides(grid), strict=True), strict=True)))
        try:
            body(*refs)
        finally:
            _GRID.reset(token)

    if folded:
        keywords |= {"grid": (math.prod(grid),), "grid_names": (ONE_AXIS,)}
    else:
        keywords |= {"grid": grid, "grid_names": grid_names}

    def run(*operands):
        results = plgpu.kernel(in_one_axis if folded else body, out_type=out_type, kernel_name=name, **keywords)(*operands)
        return tuple(_vary(result, _varying(operands)) for result in results)

    return run


def gpu_index(axis: str) -> jax.Array:
    """``jax.lax.axis_index`` of an axis of the grid that :func:`gpu_call` was given."""
    grid = _GRID.get()
    if grid is None:
        return jax.lax.axis_index(axis)
    size, stride = grid[axis]
    return jax.lax.rem(jax.lax.div(jax.lax.axis_index(ONE_AXIS), jnp.int32(stride)), jnp.int32(size))


def gpu_size(axis: str) -> int:
    """``jax.lax.axis_size`` of an axis of the grid that :func:`gpu_call` was given."""
    grid = _GRID.get()
    return jax.lax.axis_size(axis) if grid is None else grid[axis][0]


def _strides(sizes):
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def gpu_load(ref, **keywords) -> jax.Array:
    """``plgpu.load`` of all of a reference; keywords as there."""
    beside = (None,) if jax.__version_info__ < (0, 11) else ()  # jax 0.10 wants an index, which has no use any more
    return plgpu.load(ref, *beside, **keywords)


def _device():
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def _varying(arrays):
    """The axes of a mesh that any of the arrays varies over."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def _vary(x, axes):
    missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


# A stand-in for a kernel on a platform that it does not run on: has its results' shapes, and fails when it is lowered.
_refusal = Primitive("no_such_kernel")
_refusal.multiple_results = True
_refusal.def_abstract_eval(lambda *, name, shapes: shapes)


def _refusal_lowering(context, *, name, shapes):
    platforms = ", ".join(context.module_context.platforms)
    raise NotImplementedError(f"{name}: a Pallas kernel for TPU (interpreted on CPU), lowered for {platforms}; choose another one")


mlir.register_lowering(_refusal, _refusal_lowering)
