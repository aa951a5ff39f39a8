"""What the interpreter of GPU kernels does not know yet as of jax 0.11: a left operand of ``wgmma`` in registers, and accumulators that
start from a value.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.state.types import AbstractRef


def _wgmma(usual, self, eqn, token, get_invals):
    token = _after_starts(token)
    if isinstance(eqn.invars[1].aval, AbstractRef):
        return usual(self, eqn, token, get_invals)
    total, x, y, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    of_total, _, of_y = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    total = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, total, of_total)
    y = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, y, of_y)
    place = self.mesh_location, self.thread
    return callback.io_callback(_multiply, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, place, total, x, y), []


@gpu_callbacks.fail_on_exception
def _multiply(token, place, total, x, y):
    sum_so_far, store = _accessed(place, *total)
    factor, _ = _accessed(place, *y)
    store(sum_so_far + np.matmul(np.asarray(x), factor, dtype=sum_so_far.dtype))
    return token


def _deref(usual, self, eqn, token, get_invals):
    return usual(self, eqn, _after_starts(token), get_invals)


def _other(usual, self, eqn, get_invals):
    if eqn.primitive is primitives.wgmma_accumulator_store_p:
        token = jnp.zeros(gpu_callbacks.TOKEN_SHAPE_DTYPE.shape, gpu_callbacks.TOKEN_SHAPE_DTYPE.dtype)
        place = self.mesh_location, self.thread
        callback.io_callback(_start, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, place, *get_invals(), ordered=True)
        return jnp.zeros(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)
    return usual(self, eqn, get_invals)


def _after_starts(token):
    """The token, when accumulators have what they start from: ``_other`` has no token to say so, but callbacks have an order."""
    return callback.io_callback(lambda token: token, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, ordered=True)


@gpu_callbacks.fail_on_exception
def _start(token, place, ref, value):
    _, store = _accessed(place, ref, ())
    store(np.asarray(value))
    return token


def _accessed(place, ref, transforms):
    """What is at a place of memory, and a function that writes there."""
    memory, key = gpu_callbacks._get_shared_memory(), gpu_callbacks.HostAllocationKey.from_array(ref)
    where = memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
    logging = shared_memory.GPULoggingInfo(*place, None)
    value, _, _ = memory.get_buffer_content(key, where, place[1], logging_info=logging)
    assert value is not None, "out of bounds"
    return value, lambda value: memory.store_buffer_content(key, where, value, place[1], logging_info=logging)


METHODS = {"wgmma_ref_p": _wgmma, "wgmma_accumulator_deref_p": _deref, "arithmetic_primitive": _other}
