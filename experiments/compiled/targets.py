"""The chips that programs are compiled for without one, and what compiles for them: known before JAX is imported."""

import dataclasses
import importlib.util
from pathlib import Path

from hybrid_jax.chips import CHIPS, Chip
from hybrid_jax.config import ConfigError

PLUGIN = "jax_plugins.xla_cuda13"


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU generation: the smallest topology of a host, what Pallas calls the chip, and the clock of its cores.

    The clock is peak bfloat16 FLOP/s over those of a cycle. It only turns bundles into seconds, to compare with HBM's.
    """

    topology: str
    version: str
    clock_hz: float


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card, by its datasheet and the CUDA programming guide's table of compute capability 9.0."""

    kind: str
    chip: Chip
    multiprocessors: int
    clock_hz: float
    tf32_flop_per_s: float  # dense

    def flop_per_s(self, dtype: str) -> float:
        """Of the matrix units; those of float32 are tf32's."""
        return {"bfloat16": self.chip.flop_per_s, "float32": self.tf32_flop_per_s}[dtype]


TPUS = {
    "tpu:v4": Tpu("v4:2x2x1", "TPU_V4", 1.05e9),
    "tpu:v5e": Tpu("v5e:2x2", "TPU_V5E", 1.5e9),
    "tpu:v5p": Tpu("v5p:2x2x1", "TPU_V5P", 1.75e9),
    "tpu:v6e": Tpu("v6e:2x2", "TPU_V6E", 1.75e9),
    "tpu:tpu7x": Tpu("tpu7x:2x2x1", "TPU_7X", 2.2e9),
}
GPUS = {
    "gpu:h200": Gpu("NVIDIA H200", CHIPS["h200"], 132, 1.98e9, 494e12),
    "gpu:h100": Gpu("NVIDIA H100 80GB HBM3", CHIPS["h100"], 132, 1.98e9, 494e12),
}


def need_libtpu(target: str) -> None:
    """Raise ConfigError where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"{target} needs the TPU compiler, libtpu: pip install -e '.[tpu]'")


def cuda_root() -> Path:
    """Where CUDA's assembler is, of the wheels that JAX's plugin comes with. Raises ConfigError where there are none."""
    found = importlib.util.find_spec("nvidia")
    roots = [Path(place) / "cu13" for place in found.submodule_search_locations] if found else []
    for root in roots:
        if importlib.util.find_spec(PLUGIN.split(".")[0]) and importlib.util.find_spec(PLUGIN) and (root / "bin" / "ptxas").exists():
            return root
    raise ConfigError("a GPU as target needs JAX's CUDA plugin and CUDA's assembler: pip install -e '.[cuda13]'")
