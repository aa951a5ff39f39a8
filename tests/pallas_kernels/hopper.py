"""Mosaic GPU kernels on a CPU: interpreted, with races looked for, and lowered for a card that is not there."""

import contextlib
import io
from functools import partial
from unittest import mock

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode  # public from jax 0.11
from jax._src.state.types import AbstractRef, TransposeTransform

from pallas_kernels import platforms

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=1, platform="cuda")


@contextlib.contextmanager
def interpreted():
    """Programs traced meanwhile take the kernels for Hopper, and run in the interpreter; AssertionError where it finds a race."""
    jax.clear_caches()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(platforms, "generation", lambda: "hopper"))
            stack.enter_context(mock.patch.object(jaxpr_interpret.JaxprInterpreter, "_interpret_wgmma_ref_p", _wgmma))
            stack.enter_context(force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)))
            printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            yield
            jax.effects_barrier()
        assert "RACE" not in printed.getvalue(), printed.getvalue()
    finally:
        jax.clear_caches()


def lowered(function, *arguments) -> str:
    """The module that ``function`` is lowered to for an H200."""
    custom_call = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H200)):
        return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[custom_call])(*arguments).mlir_module()


def _wgmma(self, eqn, token, get_invals):
    """The interpreter's wgmma, but for operands that are transposed in shared memory or, the first one, in registers."""
    acc, a, b, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    multiply = partial(_multiply, a_is_ref=isinstance(eqn.invars[1].aval, AbstractRef))
    place = self.device_info.device_id, self.grid_point_coords, self.thread_id
    return callback.io_callback(multiply, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, place, (acc, a, b), transforms, ordered=True), []


def _multiply(token, place, operands, transforms, a_is_ref):
    device, point, thread = int(place[0]), tuple(map(int, place[1])), int(place[2])
    memory, utils = gpu_callbacks._get_shared_memory(), gpu_callbacks.interpret_utils
    thread_id = memory.get_global_thread_id(device, thread)
    logging = utils.GPULoggingInfo(device_id=device, grid_point_coords=point, thread_id=thread, source_info=None)

    def where(x, transforms):
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        turned = [t for t in transforms if isinstance(t, TransposeTransform)]
        return gpu_callbacks.HostAllocationKey.from_array(x), utils.to_range(t for t in transforms if t not in turned), turned

    def read(x, transforms):
        key, part, turned = where(x, transforms)
        value, _, _ = memory.get_buffer_content(key, part, thread_id, logging_info=logging)
        assert value is not None, "out of bounds"
        return value.T if len(turned) % 2 else value

    a = read(operands[1], transforms[1]) if a_is_ref else np.asarray(operands[1])
    b, acc = read(operands[2], transforms[2]), read(operands[0], transforms[0])
    key, part, _ = where(operands[0], transforms[0])
    memory.store_buffer_content(key, part, acc + np.asarray(a, acc.dtype) @ np.asarray(b, acc.dtype), thread_id, logging_info=logging)
    return token
