"""Configurations to and from plain values, such as a ConfigDict's or those of a JSON file."""

import dataclasses
import importlib.metadata
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from hybrid_jax.config.errors import ConfigError, meant, need
from hybrid_jax.config.mixers import MIXERS, Attention, Mixer

PLUGINS = "hybrid_jax.mixers"  # the group of entry points by which an installed package says what mixers it has


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a configuration; a mixer gains the key ``name``. Inverse of :func:`from_dict`."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    plain = {name: to_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    return ({"name": config.name} if isinstance(config, Mixer) else {}) | plain


def from_dict(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
    """Build dataclass ``cls`` from nested plain ``values`` (missing fields take their defaults).

    Raises ConfigError for an unknown field or one of the wrong type, naming it by its dotted path.
    """
    values = dict(values)
    if cls is Mixer:
        cls = _choose_mixer(values, path)
    elif cls is Attention:
        values.pop("name", None)
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            hint = meant(name, fields, f"it has {', '.join(fields)}", form="{!r}", most=1)
            raise ConfigError(f"{path} has no field {name!r}; {hint}")
    return cls(**{name: _typed(fields[name], value, f"{path}.{name}") for name, value in values.items()})


def _choose_mixer(values: dict[str, Any], path: str) -> type:
    name = values.pop("name", None)
    if name not in MIXERS:
        for plugin in importlib.metadata.entry_points(group=PLUGINS, name=str(name)):
            plugin.load()  # the module that derives it from Mixer
    if name not in MIXERS:
        raise ConfigError(
            f"{path}.name={name!r} is no mixer; choose one of {', '.join(MIXERS)}, or install the package that has it (docs/extending.md)"
        )
    return MIXERS[name]


def _typed(kind: Any, value: Any, path: str) -> Any:
    """``value`` as ``kind``, a type hint of one of the dataclasses above."""
    if kind is Mixer or dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r} must be a group of fields")
        return from_dict(kind, value, path)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):  # "X | None"
        return None if value is None else _typed(typing.get_args(kind)[0], value, path)
    if origin is Literal:
        choices = typing.get_args(kind)
        need(value in choices, f"{path}={value!r} must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        if isinstance(value, int):
            value = [value]
        need(isinstance(value, (list, tuple)), f"{path}={value!r} must be a list of integers")
        return tuple(_typed(int, item, path) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    need(isinstance(value, kind) and (kind is bool) == isinstance(value, bool), f"{path}={value!r} must be of type {kind.__name__}")
    return value
