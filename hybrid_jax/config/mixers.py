"""The token mixers: one dataclass each, its fields the choices of the layers in flash-linear-attention; the defaults are the study's."""

from dataclasses import dataclass
from typing import Literal

from hybrid_jax.config.errors import divides, need

FeatureMap = Literal["relu", "sigmoid", "logsigmoid", "silu", "sqrelu", "gelu"]


@dataclass(frozen=True)
class Attention:
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
        _check_shared_heads("attention", self)
        need(self.window is None or self.window >= 1, f"attention window={self.window} must be at least 1 (None: no limit)")


@dataclass(frozen=True)
class HGRN:
    """Gated vector recurrence with a learned lower bound on its forget gate."""

    expand_ratio: int = 1  # width of the state, over D
    conv_width: int = 0  # taps of the short convolution of what the recurrence reads; 0: none
    lower_bound: bool = True  # learned, of the forget gate; False: it may close entirely in every layer
    norm_scale: bool = True  # a learned scale in the output norm

    def check(self, width: int) -> None:
        need(self.expand_ratio >= 1, f"hgrn expand_ratio={self.expand_ratio} must be at least 1")
        _check_convolution("hgrn", self)


@dataclass(frozen=True)
class HGRN2:
    """Outer-product state with a forget gate a channel and k = 1 - gate; ``expand_ratio`` is the key width of a head."""

    expand_ratio: int = 128  # key width of a head; there are D / expand_ratio
    conv_width: int = 0  # taps of the short convolution of what the recurrence reads; 0: none
    lower_bound: bool = True  # learned, of the forget gate; False: it may close entirely in every layer
    norm_scale: bool = True  # a learned scale in the output norm

    def check(self, width: int) -> None:
        divides(self.expand_ratio, width, f"hgrn2 expand_ratio={self.expand_ratio} must divide model.width={width}")
        _check_convolution("hgrn2", self)


@dataclass(frozen=True)
class RetNet:
    """Outer-product state with a fixed decay a head."""

    heads: int = 8  # heads of queries
    kv_heads: int | None = None  # heads of keys and values; None: as many as heads
    expand_k: float = 1.0  # width of the keys of all heads, over D
    expand_v: float = 2.0  # width of the values of all heads, over D
    output_gate: bool = True  # what the output norm gives times a gate, SiLU of a projection
    feature_map: FeatureMap | None = None  # what queries and keys pass through before they are rotated; None: nothing
    norm_scale: bool = True  # a learned scale in the output norm

    def check(self, width: int) -> None:
        _check_expanded_heads("retnet", self, width)
        key_width = int(width * self.expand_k) // self.heads
        need(key_width % 2 == 0, f"retnet key width {key_width} a head must be even for rotary positions")


@dataclass(frozen=True)
class GLA:
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
        _check_expanded_heads("gla", self, width)
        _check_log_decay_min("gla", self)
        _check_convolution("gla", self)


@dataclass(frozen=True)
class DeltaNet:
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
        _check_expanded_heads("delta_net", self, width)
        _check_convolution("delta_net", self)


@dataclass(frozen=True)
class GatedDeltaNet:
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
        _check_value_heads("gated_delta_net", self)
        _check_convolution("gated_delta_net", self)


@dataclass(frozen=True)
class KDA:
    """Kimi Delta Attention: the delta rule with a decay a key channel. The study has none; the sizes are DeltaNet's."""

    heads: int = 8  # heads of queries and keys
    value_heads: int | None = None  # heads of values; None: as many as heads
    head_width: int = 128  # width of a head's queries and keys
    expand_v: float = 1.0  # width of a head's values, over head_width
    conv_width: int = 4  # taps of the short convolution of what the recurrence reads; 0: none
    negative_eigenvalues: bool = False  # beta in (0, 2) in place of (0, 1)
    log_decay_min: float | None = None  # fla's lower_bound: log decays are a sigmoid's share of it; None: -exp(A_log) softplus(.)

    def check(self, width: int) -> None:
        _check_value_heads("kda", self)
        _check_log_decay_min("kda", self)
        _check_convolution("kda", self)


def _check_convolution(name: str, mixer: "HGRN | HGRN2 | GLA | DeltaNet | GatedDeltaNet | KDA") -> None:
    need(mixer.conv_width != 1 and mixer.conv_width >= 0, f"{name} conv_width={mixer.conv_width} must be 0 (none) or at least 2")


def _check_log_decay_min(name: str, mixer: "GLA | KDA") -> None:
    least = mixer.log_decay_min
    need(least is None or least < 0, f"{name} log_decay_min={least} must be negative (None: none)")


def _check_value_heads(name: str, mixer: "GatedDeltaNet | KDA") -> None:
    values = mixer.heads if mixer.value_heads is None else mixer.value_heads
    need(values >= 1, f"{name} value_heads={mixer.value_heads} must be at least 1 (None: as many as heads)")
    divides(mixer.heads, values, f"{name} heads={mixer.heads} must divide value_heads={values}")
    need(mixer.head_width >= 1, f"{name} head_width={mixer.head_width} must be at least 1")
    value_width = mixer.head_width * mixer.expand_v
    need(value_width == int(value_width) >= 1, f"{name} expand_v={mixer.expand_v} gives a value width of {value_width}")


def _check_expanded_heads(name: str, mixer: "RetNet | GLA | DeltaNet", width: int) -> None:
    for expand in ("expand_k", "expand_v"):
        total = width * getattr(mixer, expand)
        need(
            mixer.heads >= 1 and total == int(total) and int(total) % mixer.heads == 0 and total > 0,
            f"{name} heads={mixer.heads} must divide width * {expand} = {width} * {getattr(mixer, expand)} = {total:g}",
        )
    if hasattr(mixer, "kv_heads"):
        _check_shared_heads(name, mixer)


def _check_shared_heads(name: str, mixer: "RetNet | GLA | Attention") -> None:
    kv_heads = mixer.heads if mixer.kv_heads is None else mixer.kv_heads
    divides(kv_heads, mixer.heads, f"{name} kv_heads={mixer.kv_heads} must divide heads={mixer.heads} (None: as many)")


Mixer = HGRN | HGRN2 | RetNet | GLA | DeltaNet | GatedDeltaNet | KDA | Attention
MIXERS: dict[str, type] = {
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "retnet": RetNet,
    "gla": GLA,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
    "attention": Attention,
}
NAMES: dict[type, str] = {cls: name for name, cls in MIXERS.items()}
