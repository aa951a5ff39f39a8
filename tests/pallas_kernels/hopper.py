"""Mosaic GPU kernels where there is a card, and where there is none: interpreted, with races looked for, and lowered all the same.

What the interpreter of jax 0.10 does not know yet is added to it: layouts, operands of ``wgmma`` that are transposed or in registers,
accumulators that start from a value, and ``plgpu.load``.
"""

import contextlib
import io
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.core import layout_cast_p
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode  # public from jax 0.11
from jax._src.state.types import AbstractRef, TransposeTransform

from pallas_kernels import platforms

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=1, platform="cuda")


@contextlib.contextmanager
def kernels():
    """Programs traced meanwhile take the kernels for Hopper: compiled on such a card, elsewhere interpreted.

    AssertionError where the interpreter finds a race.
    """
    if platforms.generation() == "hopper":
        yield
        return
    if jax.__version_info__ >= (0, 11):
        pytest.skip("JAX's interpreter of GPU kernels is completed here for jax 0.10 only: run this with jax 0.10, or on a Hopper GPU")
    jax.clear_caches()
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(jax.clear_caches)
        stack.enter_context(mock.patch.object(platforms, "generation", lambda: "hopper"))
        for name, method in (("swap_p", _swap), ("wgmma_ref_p", _wgmma), ("arithmetic_primitive", _other)):
            method = partial(method, getattr(JaxprInterpreter, f"_interpret_{name}"))
            stack.enter_context(mock.patch.object(JaxprInterpreter, f"_interpret_{name}", lambda *x, method=method: method(*x)))
        stack.enter_context(mock.patch.object(thread_map, "_run_jaxpr", partial(_run, thread_map._run_jaxpr)))
        stack.enter_context(force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)))
        stack.enter_context(contextlib.redirect_stdout(printed))
        yield
        jax.effects_barrier()
    assert "RACE" not in printed.getvalue(), printed.getvalue()


def lowered(function, *arguments) -> str:
    """The module that ``function`` is lowered to for an H200."""
    custom_call = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H200)):
        return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[custom_call])(*arguments).mlir_module()


def _run(usual, jaxpr, consts, *arguments):
    # A new thread does not know that the program was traced for integers of 64 bits, and traces loops again.
    dtypes = [x.aval.dtype for x in jaxpr.invars]
    with jax.enable_x64(jnp.int64 in dtypes):
        usual(jaxpr, consts, *(jnp.asarray(x, dtype) for x, dtype in zip(arguments, dtypes, strict=True)))


def _swap(usual, self, eqn, token, get_invals):
    ref, value, *leaves = get_invals()
    transforms = jax.tree.unflatten(eqn.params["tree"], leaves)
    straight = tuple(t for t in transforms if not isinstance(t, TransposeTransform))
    if len(straight) == len(transforms):
        return usual(self, eqn, token, get_invals)
    token, old = gpu_callbacks.call_swap(
        token=token,
        result_shape_and_dtype=jax.ShapeDtypeStruct(value.T.shape, value.dtype),
        device_id=jnp.int32(self.device_info.device_id),
        grid_point_coords=self.grid_point_coords,
        thread_id=self.thread_id,
        allocation_key_as_array=ref,
        transforms=straight,
        val=value.T,
        mask=None,
        source_info=eqn.source_info,
    )
    return token, old.T


def _other(usual, self, eqn, get_invals):
    if eqn.primitive is layout_cast_p:
        return get_invals()[0]
    if eqn.primitive is primitives.load_p:
        token = jnp.zeros(gpu_callbacks.TOKEN_SHAPE_DTYPE.shape, gpu_callbacks.TOKEN_SHAPE_DTYPE.dtype)
        ref, *leaves = get_invals()
        _, value = gpu_callbacks.call_get(
            token=token,
            result_shape_and_dtype=eqn.outvars[0].aval,
            device_id=jnp.int32(self.device_info.device_id),
            grid_point_coords=self.grid_point_coords,
            thread_id=self.thread_id,
            allocation_key_as_array=ref,
            transforms=jax.tree.unflatten(eqn.params["tree"], leaves),
            source_info=eqn.source_info,
        )
        return value
    if eqn.primitive is primitives.wgmma_accumulator_store_p:
        place = self.device_info.device_id, self.grid_point_coords, self.thread_id
        callback.io_callback(_store, (), place, *get_invals(), ordered=True)
        return []
    return usual(self, eqn, get_invals)


def _store(place, ref, value):
    memory, thread, logging = _memory(place)
    memory.store_buffer_content(gpu_callbacks.HostAllocationKey.from_array(ref), (), np.asarray(value), thread, logging_info=logging)
    return ()


def _wgmma(usual, self, eqn, token, get_invals):
    total, x, y, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    multiply = partial(_multiply, x_is_ref=isinstance(eqn.invars[1].aval, AbstractRef))
    place = self.device_info.device_id, self.grid_point_coords, self.thread_id
    return callback.io_callback(multiply, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, place, (total, x, y), transforms, ordered=True), []


def _multiply(token, place, operands, transforms, x_is_ref):
    memory, thread, logging = _memory(place)

    def where(ref, transforms):
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        straight = [t for t in transforms if not isinstance(t, TransposeTransform)]
        key = gpu_callbacks.HostAllocationKey.from_array(ref)
        return key, gpu_callbacks.interpret_utils.to_range(straight), (len(transforms) - len(straight)) % 2

    def read(ref, transforms):
        key, slices, turned = where(ref, transforms)
        value, _, _ = memory.get_buffer_content(key, slices, thread, logging_info=logging)
        assert value is not None, "out of bounds"
        return value.T if turned else value

    x = read(operands[1], transforms[1]) if x_is_ref else np.asarray(operands[1])
    y, total = read(operands[2], transforms[2]), read(operands[0], transforms[0])
    total = total + np.asarray(x, total.dtype) @ np.asarray(y, total.dtype)
    key, slices, _ = where(operands[0], transforms[0])
    memory.store_buffer_content(key, slices, total, thread, logging_info=logging)
    return token


def _memory(place):
    device, point, thread = int(place[0]), tuple(map(int, place[1])), int(place[2])
    memory = gpu_callbacks._get_shared_memory()
    logging = gpu_callbacks.interpret_utils.GPULoggingInfo(device_id=device, grid_point_coords=point, thread_id=thread, source_info=None)
    return memory, memory.get_global_thread_id(device, thread), logging
