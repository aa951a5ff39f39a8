"""GPUs that are not there, for JAX's CUDA plugin to compile for."""

import os

from jax.experimental import topologies

from experiments.compiled.targets import GPUS, cuda_root

COMPILER = "the GPU compiler"
# What XLA has to know of a card that is not there, as text of its GpuTargetConfigProto.
CONFIG = """
platform_name: "CUDA"
device_description_str: "{kind}"
gpu_device_info {{
  name: "{kind}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
}}
"""


def environment() -> dict[str, str]:
    """That the plugin is loaded in, to compile. Raises ConfigError where its wheels are not installed."""
    tools = cuda_root()
    return {"JAX_PLATFORMS": "cpu", "CUDA_ROOT": str(tools), "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def devices(target: str, hosts: int = 1, cards: int = 1) -> list:
    """Those of so many hosts with so many cards of a target each, in a process of this :func:`environment`."""
    it = GPUS[target]
    numbers = {"cores": it.multiprocessors, "clock": it.clock_hz / 1e9}
    config = CONFIG.format(kind=it.kind, bandwidth=int(it.chip.bytes_per_s), memory=it.chip.memory_bytes, **numbers)
    return list(topologies.get_topology_desc(target, "cuda", target_config=config, topology=f"1x{hosts}x{cards}").devices)
