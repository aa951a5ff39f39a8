"""TPUs that are not there, for libtpu to compile for."""

from jax.experimental import topologies

from experiments.compiled.targets import need_libtpu

COMPILER = "the TPU compiler"
# For libtpu to be loaded on a machine without a TPU, beside other processes that do the same, and not to look for a host's name and
# kind, which have no part in what it compiles; nor for options that are in this process's environment.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "LIBTPU_INIT_ARGS": ""}
_ENVIRONMENT |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}


def environment(target: str) -> dict[str, str]:
    """That libtpu is loaded in, to compile for a target. Raises ConfigError where it is not installed."""
    need_libtpu(target)
    return dict(_ENVIRONMENT)


def devices(topology: str, slices: int = 1) -> list:
    """Those of a topology, such as "v5e:16x16", or of several slices of it, in a process of this :func:`environment`.

    The two cores of a v4 or v5p chip are one device ("megacore"), as they are by default on real ones; libtpu has to be told of v4.
    """
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    options |= {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
