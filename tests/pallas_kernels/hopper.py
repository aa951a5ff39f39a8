"""Mosaic GPU kernels where there is a card, and where there is none: interpreted, with races looked for, and lowered all the same.

What the interpreter of the installed jax does not know yet is added to it: see :mod:`.interpreter_0_10`, :mod:`.interpreter_0_11`.
"""

import contextlib
import io
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode  # public from jax 0.11

from pallas_kernels import platforms

if jax.__version_info__ < (0, 11):
    from tests.pallas_kernels import interpreter_0_10 as interpreter
else:
    from tests.pallas_kernels import interpreter_0_11 as interpreter

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")


@contextlib.contextmanager
def kernels():
    """Programs traced meanwhile take the kernels for Hopper: compiled on such a card, elsewhere interpreted.

    AssertionError where the interpreter finds a race.
    """
    jax.clear_caches()  # of programs with other constants, which tests change
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(jax.clear_caches)
        if platforms.generation() == "hopper":
            yield
            return
        stack.enter_context(mock.patch.object(platforms, "generation", lambda: "hopper"))
        for name, method in interpreter.METHODS.items():
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
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=H200)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[custom_call])(*arguments).mlir_module()


def _run(usual, jaxpr, consts, *arguments):
    # A new thread does not know that the program was traced for integers of 64 bits, and traces loops again.
    dtypes = [x.aval.dtype for x in jaxpr.invars]
    with jax.enable_x64(jnp.int64 in dtypes):
        usual(jaxpr, consts, *(jnp.asarray(x, dtype) for x, dtype in zip(arguments, dtypes, strict=True)))
