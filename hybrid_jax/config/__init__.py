"""What a model and a run are, as frozen dataclasses checked when built.

A configuration file (``experiments/configs/``) gives an ``ml_collections.ConfigDict`` of plain values; :func:`from_dict`
turns it into a :class:`RunConfig` and refuses, by name, any field that is unknown, of the wrong type or impossible.
:func:`to_dict` is its inverse and what a run writes beside its checkpoints.
"""

from hybrid_jax.config.errors import ConfigError
from hybrid_jax.config.mixers import GLA, HGRN, HGRN2, KDA, MIXERS, Attention, DeltaNet, FeatureMap, GatedDeltaNet, Mixer, RetNet
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.config.plain import from_dict, to_dict
from hybrid_jax.config.run import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    MQARConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LogConfig",
    "MQARConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "Attention",
    "DeltaNet",
    "FeatureMap",
    "GLA",
    "GatedDeltaNet",
    "HGRN",
    "HGRN2",
    "KDA",
    "MIXERS",
    "Mixer",
    "RetNet",
    "from_dict",
    "to_dict",
]
