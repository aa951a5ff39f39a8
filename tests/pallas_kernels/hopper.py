"""Mosaic GPU kernels on a CPU: interpreted, with races looked for, and lowered for a card that is not there."""

import contextlib
import io

import jax
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode  # public from jax 0.11

from pallas_kernels import platforms

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=1, platform="cuda")


@contextlib.contextmanager
def interpreted():
    """Programs traced meanwhile take the kernels for Hopper, and run in the interpreter; AssertionError where it finds a race."""
    traced_for, platforms.generation = platforms.generation, lambda: "hopper"
    jax.clear_caches()
    try:
        with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)), contextlib.redirect_stdout(io.StringIO()) as printed:
            yield
            jax.effects_barrier()
        assert "RACE" not in printed.getvalue(), printed.getvalue()
    finally:
        platforms.generation = traced_for
        jax.clear_caches()


def lowered(function, *arguments) -> str:
    """The module that ``function`` is lowered to for an H200."""
    custom_call = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H200)):
        return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[custom_call])(*arguments).mlir_module()
