"""The token mixers: one dataclass each, its fields the choices of the layers in flash-linear-attention; the defaults are the study's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from hybrid_jax.config.errors import divides, need

FeatureMap = Literal["relu", "sigmoid", "logsigmoid", "silu", "sqrelu", "gelu"]
MIXERS: dict[str, type["Mixer"]] = {}  # all there are, by name; whoever derives from Mixer adds one


class Mixer(ABC):
    """What all of them are: frozen dataclasses of plain values, ``class HGRN(Mixer, name="hgrn", state_flops=2)``.

    name: of its layers, in ``config.model.mixer.name`` and in the trainer's words. state_flops: what a token costs for each element of
    the state: its decay 1, a write 2, a read 2, a delta rule's look before it writes 2. One of your own: docs/extending.md.
    """

    name: ClassVar[str]
    state_flops: ClassVar[int]

    def __init_subclass__(cls, name: str, state_flops: int):
        cls.name, cls.state_flops = name, state_flops
        known = MIXERS.setdefault(name, cls)
        same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)  # the same file, read once more
        need(same, f"there is a mixer {name!r} already, {known.__module__}.{known.__qualname__}: give another name")
        MIXERS[name] = cls

    def check(self, width: int) -> None:  # noqa: B027 (most of one's own have nothing to check)
        """Raise ConfigError where its choices cannot be, in a model of this width."""

    @abstractmethod
    def state_elements(self, width: int) -> int:
        """Elements of a layer's recurrent state, in a model of this width."""

    def convolution_channels(self, width: int) -> int:
        """Channels that pass a layer's short convolution, where its ``conv_width`` is not 0."""
        return 0


class _ExpandedHeads:
    """Sizes of those whose heads share out multiples of D: ``expand_k`` of keys, ``expand_v`` of values."""

    def state_elements(self, width: int) -> int:
        return int(width * self.expand_k) * int(width * self.expand_v) // self.heads


class _ValueHeads:
    """Sizes of those that have heads of a width of their own, and as many or more of values as of keys."""

    def state_elements(self, width: int) -> int:
        return (self.value_heads or self.heads) * self.head_width * int(self.head_width * self.expand_v)

    def convolution_channels(self, width: int) -> int:
        return self.head_width * (2 * self.heads + int((self.value_heads or self.heads) * self.expand_v))


@dataclass(frozen=True)
class HGRN(Mixer, name="hgrn", state_flops=2):
    """Gated vector recurrence with a learned lower bound on its forget gate."""

    expand_ratio: int = 1  # width of the state, over D
    conv_width: int = 0  # taps of the short convolution of what the recurrence reads; 0: none
    lower_bound: bool = True  # learned, of the forget gate; False: it may close entirely in every layer
    norm_scale: bool = True  # a learned scale in the output norm

    def check(self, width: int) -> None:
        need(self.expand_ratio >= 1, f"hgrn expand_ratio={self.expand_ratio} must be at least 1")
        _check_convolution(self)

    def state_elements(self, width: int) -> int:
        return width * self.expand_ratio

    def convolution_channels(self, width: int) -> int:
        return 2 * width * self.expand_ratio


@dataclass(frozen=True)
class HGRN2(Mixer, name="hgrn2", state_flops=5):
    """Outer-product state with a forget gate a channel and k = 1 - gate; ``expand_ratio`` is the key width of a head."""

    expand_ratio: int = 128  # key width of a head; there are D / expand_ratio
    conv_width: int = 0  # taps of the short convolution of what the recurrence reads; 0: none
    lower_bound: bool = True  # learned, of the forget gate; False: it may close entirely in every layer
    norm_scale: bool = True  # a learned scale in the output norm

    def check(self, width: int) -> None:
        divides(self.expand_ratio, width, f"hgrn2 expand_ratio={self.expand_ratio} must divide model.width={width}")
        _check_convolution(self)

    def state_elements(self, width: int) -> int:
        return width * self.expand_ratio

    def convolution_channels(self, width: int) -> int:
        return 3 * width


@dataclass(frozen=True)
class RetNet(_ExpandedHeads, Mixer, name="retnet", state_flops=5):
    """Outer-product state with a fixed decay a head."""

    heads: int = 8  # heads of queries
    kv_heads: int | None = None  # heads of keys and values; None: as many as heads
    expand_k: float = 1.0  # width of the keys of all heads, over D
    expand_v: float = 2.0  # width of the values of all heads, over D
    output_gate: bool = True  # what the output norm gives times a gate, SiLU of a projection
    feature_map: FeatureMap | None = None  # what queries and keys pass through before they are rotated; None: nothing
    norm_scale: bool = True  # a learned scale in the output norm

    def check(self, width: int) -> None:
        _check_expanded_heads(self, width)
        key_width = int(width * self.expand_k) // self.heads
        need(key_width % 2 == 0, f"retnet key width {key_width} a head must be even for rotary positions")


@dataclass(frozen=True)
class GLA(_ExpandedHeads, Mixer, name="gla", state_flops=5):
    """Outer-product state with a learned decay a key channel."""

    heads: int = 4  # heads of queries
    kv_heads: int | None = None  # heads of keys and values; None: as many as heads
    expand_k: float = 0.5  # width of the keys of all heads, over D
    expand_v: float = 1.0  # width of the values of all heads, over D
    output_gate: bool = True  # what the output norm gives times a gate, SiLU of a projection
    conv_width: int = 0  # taps of the short convolution of what the recurrence reads; 0: none
    log_decay_min: float | None = None  # the least log decay of a step, fla's clamp_min; None: none
    feature_map: FeatureMap | None = None  # what queries and keys pass through; None: nothing
    norm_scale: bool = True  # a learned scale in the output norm

    def check(self, width: int) -> None:
        _check_expanded_heads(self, width)
        _check_log_decay_min(self)
        _check_convolution(self)

    def convolution_channels(self, width: int) -> int:
        kv_share = (self.kv_heads or self.heads) / self.heads
        return int(width * (self.expand_k * (1 + kv_share) + self.expand_v * kv_share))


@dataclass(frozen=True)
class DeltaNet(_ExpandedHeads, Mixer, name="delta_net", state_flops=6):
    """Delta rule without decay."""

    heads: int = 8  # heads of queries, keys and values
    expand_k: float = 1.0  # width of the keys of all heads, over D
    expand_v: float = 1.0  # width of the values of all heads, over D
    conv_width: int = 4  # taps of the short convolution of what the recurrence reads; 0: none
    beta: bool = True  # how strongly each token writes is learned; False: beta = 1
    output_gate: bool = False  # what the output norm gives times a gate, SiLU of a projection
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"  # of queries and keys; elu: with 1 added
    qk_norm: Literal["l2", "sum"] = "l2"  # what queries and keys are divided by: their length, or the sum of their absolute values
    negative_eigenvalues: bool = False  # beta in (0, 2) in place of (0, 1)

    def check(self, width: int) -> None:
        _check_expanded_heads(self, width)
        _check_convolution(self)

    def convolution_channels(self, width: int) -> int:
        return int(width * (2 * self.expand_k + self.expand_v))


@dataclass(frozen=True)
class GatedDeltaNet(_ValueHeads, Mixer, name="gated_delta_net", state_flops=7):
    """Delta rule with a decay a head."""

    heads: int = 4  # heads of queries and keys
    value_heads: int | None = None  # heads of values; None: as many as heads
    head_width: int = 256  # width of a head's queries and keys
    expand_v: float = 1.0  # width of a head's values, over head_width
    conv_width: int = 4  # taps of the short convolution of what the recurrence reads; 0: none
    output_gate: bool = True  # what the output norm gives times a gate, an activation of a projection
    gate_activation: Literal["silu", "sigmoid"] = "silu"  # that activation
    negative_eigenvalues: bool = False  # beta in (0, 2) in place of (0, 1)
    # "intended": A ~ U(0, 16), dt ~ log U(1e-3, 1e-1). "zero": A_log = dt_bias = 0, what the study's runs probably had.
    decay_init: Literal["intended", "zero"] = "intended"

    def check(self, width: int) -> None:
        _check_value_heads(self)
        _check_convolution(self)


@dataclass(frozen=True)
class KDA(_ValueHeads, Mixer, name="kda", state_flops=7):
    """Kimi Delta Attention: the delta rule with a decay a key channel. The study has none; the sizes are DeltaNet's."""

    heads: int = 8  # heads of queries and keys
    value_heads: int | None = None  # heads of values; None: as many as heads
    head_width: int = 128  # width of a head's queries and keys
    expand_v: float = 1.0  # width of a head's values, over head_width
    conv_width: int = 4  # taps of the short convolution of what the recurrence reads; 0: none
    negative_eigenvalues: bool = False  # beta in (0, 2) in place of (0, 1)
    log_decay_min: float | None = None  # fla's lower_bound: log decays are a sigmoid's share of it; None: -exp(A_log) softplus(.)

    def check(self, width: int) -> None:
        _check_value_heads(self)
        _check_log_decay_min(self)
        _check_convolution(self)


@dataclass(frozen=True)
class Attention(Mixer, name="attention", state_flops=0):
    """Causal softmax attention (head width D / heads), with rotary positions or, beside recurrences that know the order, none (NoPE)."""

    heads: int = 16  # heads of queries
    kv_heads: int | None = None  # heads of keys and values; None: as many as heads
    rope_theta: float | None = 10000.0  # base of the rotary positions; None: no positions
    qkv_bias: bool = False  # in the projections to queries, keys and values
    qk_norm: bool = False  # an RMS norm of each head's queries and keys
    window: int | None = None  # tokens that each token sees, itself among them; None: the whole past

    def check(self, width: int) -> None:
        divides(self.heads, width, f"attention heads={self.heads} must divide model.width={width}")
        if self.rope_theta is not None:
            need(self.rope_theta > 0, f"attention rope_theta={self.rope_theta} must be above 0 (None: no positions)")
            need(width // self.heads % 2 == 0, f"attention head width {width // self.heads} must be even for rotary positions")
        _check_shared_heads(self)
        need(self.window is None or self.window >= 1, f"attention window={self.window} must be at least 1 (None: no limit)")

    def state_elements(self, width: int) -> int:
        return 0


def _check_convolution(mixer: Mixer) -> None:
    need(mixer.conv_width != 1 and mixer.conv_width >= 0, f"{mixer.name} conv_width={mixer.conv_width} must be 0 (none) or at least 2")


def _check_log_decay_min(mixer: Mixer) -> None:
    least = mixer.log_decay_min
    need(least is None or least < 0, f"{mixer.name} log_decay_min={least} must be negative (None: none)")


def _check_value_heads(mixer: Mixer) -> None:
    values = mixer.heads if mixer.value_heads is None else mixer.value_heads
    need(values >= 1, f"{mixer.name} value_heads={mixer.value_heads} must be at least 1 (None: as many as heads)")
    divides(mixer.heads, values, f"{mixer.name} heads={mixer.heads} must divide value_heads={values}")
    need(mixer.head_width >= 1, f"{mixer.name} head_width={mixer.head_width} must be at least 1")
    value_width = mixer.head_width * mixer.expand_v
    need(value_width == int(value_width) >= 1, f"{mixer.name} expand_v={mixer.expand_v} gives a value width of {value_width}")


def _check_expanded_heads(mixer: Mixer, width: int) -> None:
    for expand in ("expand_k", "expand_v"):
        total = width * getattr(mixer, expand)
        need(
            mixer.heads >= 1 and total == int(total) and int(total) % mixer.heads == 0 and total > 0,
            f"{mixer.name} heads={mixer.heads} must divide width * {expand} = {width} * {getattr(mixer, expand)} = {total:g}",
        )
    if hasattr(mixer, "kv_heads"):
        _check_shared_heads(mixer)


def _check_shared_heads(mixer: Mixer) -> None:
    kv_heads = mixer.heads if mixer.kv_heads is None else mixer.kv_heads
    divides(kv_heads, mixer.heads, f"{mixer.name} kv_heads={mixer.kv_heads} must divide heads={mixer.heads} (None: as many)")
