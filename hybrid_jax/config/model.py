"""What a model is: its blocks, and which of their mixers are full attention."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from hybrid_jax import layout
from hybrid_jax.config.errors import ConfigError, need
from hybrid_jax.config.mixers import GLA, Attention, Mixer


@dataclass(frozen=True)
class ModelConfig:
    """A stack of ``layers`` blocks, most with ``mixer``, those the layout names with full ``attention``."""

    mixer: Mixer = field(default_factory=GLA)  # of every layer but the full-attention ones
    attention: Attention = field(default_factory=Attention)  # of the full-attention layers
    layers: int = 24  # blocks of a mixer and an MLP
    width: int = 1024  # D, of what passes from layer to layer
    # Which layers are full attention: a ratio in one of its two readings, or an explicit list of 0-based layers.
    ratio: int | None = None  # None: every layer is `mixer`
    ratio_reading: Literal["every", "after"] = "every"  # "every r-th layer", or "r of the mixer, then one"
    attention_layers: tuple[int, ...] = ()  # in place of a ratio
    vocabulary: int = 32000  # token ids, of which a tokenizer may leave some unused
    # Sets the MLP's hidden width, as 2/3 mlp_ratio D: its three matrices are then as large as the two of an MLP without a gate.
    mlp_ratio: float = 4.0
    mlp_width: int | None = None  # F, the MLP's hidden width; None: 256 * ceil(D * mlp_ratio * 2/3 / 256)
    tied: bool = False  # one matrix for embedding and output
    norm_eps: float = 1e-6  # added to the mean square in RMS norms, but in HGRN2's and in those of queries and keys (1e-5, as in fla)
    init_std: float = 0.02  # standard deviation of the projections' and the embedding's first values
    # What the projections back to the model's width start with: "plain" init_std, as all others do; "rescaled" what flash-linear-attention
    # gave its recurrent models from March to June of 2025: 1 / sqrt(3 inputs), over sqrt(2 layers), as a layer adds two of their outputs.
    residual_init: Literal["plain", "rescaled"] = "plain"
    # Of compute; parameters are float32. Products of float32 follow JAX's jax_default_matmul_precision, which on TPUs and GPUs is less than
    # float32's own unless asked for (JAX_DEFAULT_MATMUL_PRECISION=highest).
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass computes again: "none" nothing; "operators" everything but the projections' outputs, which are kept; "block"
    # the whole block. The output of full attention, whose work grows with the square of the window, is always kept, but where cuDNN
    # computes it.
    remat: Literal["none", "operators", "block"] = "block"

    def __post_init__(self):
        for name in ("layers", "width", "vocabulary"):
            need(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("mlp_ratio", "norm_eps"):
            need(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        need(self.init_std >= 0, f"model.init_std={self.init_std} must not be negative")
        need(self.mlp_width is None or self.mlp_width >= 1, f"model.mlp_width={self.mlp_width} must be at least 1")
        self.mixer.check(self.width)
        if self.ratio is not None and self.attention_layers:
            raise ConfigError("model.ratio and model.attention_layers are two ways to say one thing: give one of them")
        if isinstance(self.mixer, Attention):
            need(self.ratio is None and not self.attention_layers, "model.mixer is attention already: leave ratio and attention_layers out")
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
        return layout.layer_kinds(self.layers, full, self.mixer.name)

    def computing_in(self, dtype: str | None) -> Self:
        """The same model, computing in ``dtype``; None: in its own. Raises ConfigError for one that it cannot compute in."""
        need(dtype in (None, "bfloat16", "float32"), f"dtype={dtype!r} must be 'bfloat16' or 'float32' (None: what the model says)")
        return replace(self, dtype=dtype or self.dtype)

    def residual_std(self, inputs: int) -> float:
        """The standard deviation that a projection of so many inputs back to the model's width starts with."""
        return self.init_std if self.residual_init == "plain" else (3 * inputs * 2 * self.layers) ** -0.5

    @property
    def mlp_hidden(self) -> int:
        """F, the width inside the MLP."""
        return self.mlp_width or 256 * -(-int(self.width * self.mlp_ratio * 2 / 3) // 256)
