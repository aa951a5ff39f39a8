"""What a model and a run are, as frozen dataclasses checked when built.

A configuration file (``experiments/configs/``) gives an ``ml_collections.ConfigDict`` of plain values; :func:`from_dict`
turns it into a :class:`RunConfig` and refuses, by name, any field that is unknown, of the wrong type or impossible.
:func:`to_dict` is its inverse and what a run writes beside its checkpoints.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hybrid_jax import layout


class ConfigError(ValueError):
    """A configuration that can not be run; the message names the field, what it got and what it needs."""


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _divides(part: int, whole: int, message: str) -> None:
    _need(part >= 1 and whole % part == 0, message)


# ---------------------------------------------------------------- token mixers
#
# One dataclass a mixer, its fields the choices of the layers in flash-linear-attention; the defaults are the study's.

FeatureMap = Literal["relu", "sigmoid", "logsigmoid", "silu", "sqrelu", "gelu"]


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention with rotary positions (head width D / heads)."""

    heads: int = 16
    kv_heads: int | None = None  # None: as many as heads
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None  # None: the whole past

    def check(self, width: int) -> None:
        _divides(self.heads, width, f"attention heads={self.heads} must divide model.width={width}")
        _need(width // self.heads % 2 == 0, f"attention head width {width // self.heads} must be even for rotary positions")
        _divides(self.kv_heads or self.heads, self.heads, f"attention kv_heads={self.kv_heads} must divide heads={self.heads}")
        _need(self.window is None or self.window >= 1, f"attention window={self.window} must be at least 1 (None: no limit)")


@dataclass(frozen=True)
class HGRN:
    """Gated vector recurrence with a learned lower bound on its forget gate."""

    expand_ratio: int = 1
    conv_width: int = 0  # 0: no short convolution
    lower_bound: bool = True  # False: the forget gate may close entirely in every layer
    norm_scale: bool = True  # a learned scale in the output norm

    def check(self, width: int) -> None:
        _need(self.expand_ratio >= 1, f"hgrn expand_ratio={self.expand_ratio} must be at least 1")
        _need(self.conv_width != 1 and self.conv_width >= 0, f"hgrn conv_width={self.conv_width} must be 0 (none) or at least 2")


@dataclass(frozen=True)
class HGRN2:
    """Outer-product state with a forget gate a channel and k = 1 - gate; ``expand_ratio`` is the key width of a head."""

    expand_ratio: int = 128
    conv_width: int = 0
    lower_bound: bool = True
    norm_scale: bool = True

    def check(self, width: int) -> None:
        _divides(self.expand_ratio, width, f"hgrn2 expand_ratio={self.expand_ratio} must divide model.width={width}")
        _need(self.conv_width != 1 and self.conv_width >= 0, f"hgrn2 conv_width={self.conv_width} must be 0 (none) or at least 2")


@dataclass(frozen=True)
class RetNet:
    """Outer-product state with a fixed decay a head."""

    heads: int = 8
    kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 2.0
    output_gate: bool = True
    feature_map: FeatureMap | None = None  # of queries and keys, before they are rotated
    norm_scale: bool = True

    def check(self, width: int) -> None:
        _check_expanded_heads("retnet", self, width)
        key_width = int(width * self.expand_k) // self.heads
        _need(key_width % 2 == 0, f"retnet key width {key_width} a head must be even for rotary positions")


@dataclass(frozen=True)
class GLA:
    """Outer-product state with a learned decay a key channel."""

    heads: int = 4
    kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    output_gate: bool = True
    conv_width: int = 0
    log_decay_min: float | None = None  # fla's clamp_min
    feature_map: FeatureMap | None = None  # of queries and keys
    norm_scale: bool = True

    def check(self, width: int) -> None:
        _check_expanded_heads("gla", self, width)
        _need(self.conv_width != 1 and self.conv_width >= 0, f"gla conv_width={self.conv_width} must be 0 (none) or at least 2")


@dataclass(frozen=True)
class DeltaNet:
    """Delta rule without decay."""

    heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_width: int = 4
    beta: bool = True  # False: beta = 1
    output_gate: bool = False
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"
    qk_norm: Literal["l2", "sum"] = "l2"
    negative_eigenvalues: bool = False  # beta in (0, 2)

    def check(self, width: int) -> None:
        _check_expanded_heads("delta_net", self, width)
        _need(self.conv_width != 1 and self.conv_width >= 0, f"delta_net conv_width={self.conv_width} must be 0 (none) or at least 2")


@dataclass(frozen=True)
class GatedDeltaNet:
    """Delta rule with a decay a head."""

    heads: int = 4
    value_heads: int | None = None  # None: as many as heads
    head_width: int = 256
    expand_v: float = 1.0
    conv_width: int = 4
    output_gate: bool = True
    gate_activation: Literal["silu", "sigmoid"] = "silu"  # of the output gate
    negative_eigenvalues: bool = False
    # "intended": A ~ U(0, 16), dt ~ log U(1e-3, 1e-1). "zero": A_log = dt_bias = 0, what the study's runs probably had.
    decay_init: Literal["intended", "zero"] = "intended"

    def check(self, width: int) -> None:
        values = self.value_heads or self.heads
        _divides(self.heads, values, f"gated_delta_net heads={self.heads} must divide value_heads={values}")
        _need(self.head_width >= 1, f"gated_delta_net head_width={self.head_width} must be at least 1")
        value_width = self.head_width * self.expand_v
        _need(value_width == int(value_width) >= 1, f"gated_delta_net expand_v={self.expand_v} gives a value width of {value_width}")
        _need(self.conv_width != 1 and self.conv_width >= 0, f"gated_delta_net conv_width={self.conv_width} must be 0 (none) or at least 2")


def _check_expanded_heads(name: str, mixer: "RetNet | GLA | DeltaNet", width: int) -> None:
    _divides(getattr(mixer, "kv_heads", None) or mixer.heads, mixer.heads, f"{name} kv_heads must divide heads={mixer.heads}")
    for expand in ("expand_k", "expand_v"):
        total = width * getattr(mixer, expand)
        _need(
            mixer.heads >= 1 and total == int(total) and int(total) % mixer.heads == 0 and total > 0,
            f"{name} heads={mixer.heads} must divide width * {expand} = {width} * {getattr(mixer, expand)} = {total:g}",
        )


Mixer = HGRN | HGRN2 | RetNet | GLA | DeltaNet | GatedDeltaNet | Attention
MIXERS: dict[str, type] = {
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "retnet": RetNet,
    "gla": GLA,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "attention": Attention,
}
NAMES: dict[type, str] = {cls: name for name, cls in MIXERS.items()}


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class ModelConfig:
    """A stack of ``layers`` blocks, most with ``mixer``, those the layout names with full ``attention``."""

    mixer: Mixer = field(default_factory=GLA)
    attention: Attention = field(default_factory=Attention)
    layers: int = 24
    width: int = 1024  # D
    # Which layers are full attention: a ratio in one of its two readings, or an explicit list of 0-based layers.
    ratio: int | None = None  # None: every layer is `mixer`
    ratio_reading: Literal["every", "after"] = "every"  # "every r-th layer", or "r of the mixer, then one"
    attention_layers: tuple[int, ...] = ()
    vocabulary: int = 32000
    mlp_ratio: float = 4.0
    mlp_width: int | None = None  # None: 256 * ceil(D * mlp_ratio * 2/3 / 256)
    tied: bool = False  # one matrix for embedding and output
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of compute; parameters are float32
    # What backward computes again: "none" nothing, "operators" all but the projections' outputs, "block" all of a block.
    remat: Literal["none", "operators", "block"] = "block"

    def __post_init__(self):
        for name in ("layers", "width", "vocabulary"):
            _need(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        _need(self.mlp_width is None or self.mlp_width >= 1, f"model.mlp_width={self.mlp_width} must be at least 1")
        self.mixer.check(self.width)
        if self.ratio is not None and self.attention_layers:
            raise ConfigError("model.ratio and model.attention_layers are two ways to say one thing: give one of them")
        if isinstance(self.mixer, Attention):
            _need(
                self.ratio is None and not self.attention_layers, "model.mixer is attention already: leave ratio and attention_layers out"
            )
        try:
            kinds = self.layer_kinds
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
        if "attention" in kinds:
            self.full_attention.check(self.width)

    @property
    def full_attention(self) -> Attention:
        """The attention of the full-attention layers (of a Transformer: its mixer)."""
        return self.mixer if isinstance(self.mixer, Attention) else self.attention

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The mixer's name, layer by layer: "attention" at full-attention layers."""
        full = self.attention_layers or layout.attention_layers(self.layers, self.ratio, self.ratio_reading)
        return layout.layer_kinds(self.layers, full, NAMES[type(self.mixer)])

    @property
    def mlp_hidden(self) -> int:
        """F, the width inside the MLP."""
        return self.mlp_width or 256 * -(-int(self.width * self.mlp_ratio * 2 / 3) // 256)


# ---------------------------------------------------------------- a run


@dataclass(frozen=True)
class MQARConfig:
    """Multi-query associative recall mixed into the training batches, and measured at every evaluation.

    Rows take turns among the kinds of problems, ``pairs[i]`` in ``length[i]`` tokens: small ones teach how, large ones how much.
    """

    share: float = 0.0  # of the rows of a batch; 0: none
    pairs: tuple[int, ...] = (4,)
    length: tuple[int, ...] = (64,)  # tokens of one problem; a window holds as many as fit
    alphabet: int = 32  # distinct keys, and as many values
    examples: int = 64  # problems of each kind in the evaluation

    def __post_init__(self):
        _need(0 <= self.share < 1, f"data.mqar.share={self.share} must be in [0, 1)")
        for name in ("pairs", "length", "alphabet", "examples"):
            values = getattr(self, name)
            _need(min(values if isinstance(values, tuple) else [values], default=0) >= 1, f"data.mqar.{name}={values} must be at least 1")
        _need(
            len(self.pairs) == len(self.length),
            f"data.mqar.pairs={self.pairs} and data.mqar.length={self.length} must be as many, a length for each number of pairs",
        )


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"  # the text of Python's own standard library, or the folder or URL of a token store
    window: int = 4096  # T
    packing: Literal["windows", "documents"] = "windows"
    mqar: MQARConfig = field(default_factory=MQARConfig)

    def __post_init__(self):
        _need(self.window >= 2, f"data.window={self.window} must be at least 2 tokens")
        _need(
            self.mqar.share == 0 or max(self.mqar.length) <= self.window,
            f"data.mqar.length={self.mqar.length} must fit in data.window={self.window}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon", "schedule_free"] = "adamw"
    learning_rate: float = 3e-4  # the peak
    final_fraction: float = 0.1  # of the peak, at the last step
    warmup_steps: int = 1024
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        _need(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive")
        _need(0 <= self.final_fraction <= 1, f"optimizer.final_fraction={self.final_fraction} must be in [0, 1]")
        _need(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must not be negative")
        _need(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} must be positive")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 40000
    batch: int = 128  # sequences a step, over all devices
    microbatch: int = 4  # sequences a device (of the data and fsdp axes) holds at once; the rest is accumulated
    seed: int = 42
    log_every: int = 10
    bad_steps: int = 10  # stop after so many steps in a row with a gradient that is not finite

    def __post_init__(self):
        for name in ("steps", "batch", "microbatch", "log_every", "bad_steps"):
            _need(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class EvaluationConfig:
    every: int | None = None  # steps; None: only at the end
    tokens: int = 2**20  # of held-out text at most
    batch: int = 8  # sequences

    def __post_init__(self):
        _need(self.every is None or self.every >= 1, f"evaluation.every={self.every} must be at least 1 (None: only at the end)")
        _need(self.tokens >= 1 and self.batch >= 1, "evaluation.tokens and evaluation.batch must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps; the last step is always saved
    keep: int = 3  # newest checkpoints kept

    def __post_init__(self):
        _need(self.every >= 1 and self.keep >= 1, "checkpoint.every and checkpoint.keep must be at least 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, at one axis at most: all that remain."""

    data: int = 1
    fsdp: int = -1
    seq: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        _need(all(size == -1 or size >= 1 for size in sizes), f"mesh sizes {sizes} must be at least 1, or -1 for the rest")
        _need(sizes.count(-1) <= 1, f"mesh sizes {sizes}: only one axis can be -1")


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = True
    wandb_project: str | None = None  # None: no Weights & Biases


@dataclass(frozen=True)
class RunConfig:
    """Everything that makes a training run what it is."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
    platform: Literal["any", "cpu", "gpu", "tpu"] = "any"  # refuse to start on another one


# ---------------------------------------------------------------- to and from plain values


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a configuration; a mixer gains the key ``name``. Inverse of :func:`from_dict`."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    plain = {name: to_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    return ({"name": NAMES[type(config)]} if type(config) in NAMES else {}) | plain


def from_dict(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
    """Build dataclass ``cls`` from nested plain ``values`` (missing fields take their defaults).

    Raises ConfigError for an unknown field or one of the wrong type, naming it by its dotted path.
    """
    values = dict(values)
    if cls is Mixer:
        cls = _choose_mixer(values, path)
    elif cls is Attention:
        values.pop("name", None)
    fields = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(fields)}"
            raise ConfigError(f"{path} has no field {name!r}{hint}")
    return cls(**{name: _typed(fields[name], value, f"{path}.{name}") for name, value in values.items()})


def _choose_mixer(values: dict[str, Any], path: str) -> type:
    name = values.pop("name", None)
    if name not in MIXERS:
        raise ConfigError(f"{path}.name={name!r} is no mixer; choose one of {', '.join(MIXERS)}")
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
        _need(value in choices, f"{path}={value!r} must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        if isinstance(value, int):
            value = [value]
        _need(isinstance(value, (list, tuple)), f"{path}={value!r} must be a list of integers")
        return tuple(_typed(int, item, path) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _need(isinstance(value, kind) and (kind is bool) == isinstance(value, bool), f"{path}={value!r} must be of type {kind.__name__}")
    return value
