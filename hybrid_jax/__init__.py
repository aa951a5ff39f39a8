"""Hybrid linear-attention language models in JAX.

model = hybrid_jax.build(config, seed=0)          # fresh parameters, of a ModelConfig or a RunConfig
model = hybrid_jax.load(folder)                   # a run's workdir, its newest or a named step; or a Hugging Face folder
logits = model(tokens, segment_ids=None)          # [B,T] int -> [B,T,vocabulary] float32
texts = hybrid_jax.generate(model, prompts, ...)  # texts or lists of tokens; hybrid_jax.stream gives them as they are written
hybrid_jax.config, hybrid_jax.mixers              # what a model is made of, as configurations and as modules
"""

import importlib
import importlib.metadata

_HOME = {
    "Model": "hybrid_jax.model",
    "build": "hybrid_jax.model",
    "generate": "hybrid_jax.generation",
    "load": "hybrid_jax.loading",
    "stream": "hybrid_jax.generation",
}
_MODULES = ("config", "mixers")
__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES, "__version__"})


def __getattr__(name: str):
    # Imported on first use: the data tools need neither JAX nor the models, and their workers should start at once.
    if name == "__version__":
        try:
            return importlib.metadata.version("hybrid-jax")
        except importlib.metadata.PackageNotFoundError:
            raise AttributeError(f"{__name__!r} has a version once it is installed: pip install -e .") from None
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
