"""fla's config.json to and from a ModelConfig. Each option is honoured, of no effect on what a model computes, or refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_jax import config
from hybrid_jax.config import ConfigError, ModelConfig, from_dict, to_dict


@dataclass(frozen=True)
class Family:
    """One model type of fla, and its options beside those that all have."""

    mixer: type  # in hybrid_jax.config
    prefix: str  # of fla's class names
    fields: Mapping[str, tuple[str, Any]]  # option -> (the mixer's field of the same meaning, fla's default)
    refused: Mapping[str, tuple[Any, str]]  # option -> (the one value that can be had, why no other)
    short_conv: bool = False  # fla's default
    layers: int = 24
    hidden_ratio: float = 4.0


_NO_SUCH_LAYER = "fla's layer has never used it, and no model could have been trained with it"
_SHARED_HEADS = {"num_heads": ("heads", None), "num_kv_heads": ("kv_heads", None)}
_EXPANDED = {"expand_k": ("expand_k", 1.0), "expand_v": ("expand_v", 1.0)}
_SCALE = {"elementwise_affine": ("norm_scale", True)}
_OUTPUT = {"use_output_gate": ("output_gate", True), "feature_map": ("feature_map", None)}

FAMILIES: dict[str, Family] = {
    "hgrn": Family(
        config.HGRN,
        "HGRN",
        {"expand_ratio": ("expand_ratio", 1), "use_lower_bound": ("lower_bound", True)} | _SCALE,
        {"num_heads": (1, "the state of HGRN is one vector")},
    ),
    "hgrn2": Family(
        config.HGRN2,
        "HGRN2",
        {"expand_ratio": ("expand_ratio", 128), "use_lower_bound": ("lower_bound", True)} | _SCALE,
        {},
    ),
    "retnet": Family(
        config.RetNet,
        "RetNet",
        _SHARED_HEADS | _EXPANDED | _OUTPUT | _SCALE | {"num_heads": ("heads", 8), "expand_v": ("expand_v", 2.0)},
        {"use_short_conv": (False, _NO_SUCH_LAYER), "use_gk": (True, _NO_SUCH_LAYER), "use_gv": (False, _NO_SUCH_LAYER)},
        hidden_ratio=2.0,
    ),
    "gla": Family(
        config.GLA,
        "GLA",
        _SHARED_HEADS
        | _EXPANDED
        | _OUTPUT
        | _SCALE
        | {"num_heads": ("heads", 4), "expand_k": ("expand_k", 0.5), "clamp_min": ("log_decay_min", None)},
        {"use_gk": (True, _NO_SUCH_LAYER), "use_gv": (False, _NO_SUCH_LAYER)},
    ),
    "delta_net": Family(
        config.DeltaNet,
        "DeltaNet",
        _EXPANDED
        | {
            "num_heads": ("heads", 16),
            "use_beta": ("beta", True),
            "use_gate": ("output_gate", False),
            "qk_activation": ("qk_activation", "silu"),
            "qk_norm": ("qk_norm", "l2"),
            "allow_neg_eigval": ("negative_eigenvalues", False),
        },
        {
            "use_output_norm": (True, _NO_SUCH_LAYER),
            "use_rope": (False, "fla has dropped it"),
            "use_elu": (False, 'fla now says qk_activation="elu"'),
            "tie_feature_map_qk": (False, "fla has dropped it"),
            "norm_q": (False, "fla has dropped it"),
            "norm_k": (False, "fla has dropped it"),
            "norm_feature_map": (False, "fla has dropped it"),
        },
        short_conv=True,
    ),
    "gated_deltanet": Family(
        config.GatedDeltaNet,
        "GatedDeltaNet",
        {
            "num_heads": ("heads", 6),
            "num_v_heads": ("value_heads", None),
            "head_dim": ("head_width", 256),
            "expand_v": ("expand_v", 2.0),
            "use_gate": ("output_gate", True),
            "output_gate_activation": ("gate_activation", "silu"),
            "allow_neg_eigval": ("negative_eigenvalues", False),
        },
        {},
        short_conv=True,
        layers=21,
    ),
    "kda": Family(
        config.KDA,
        "KDA",
        {
            "num_heads": ("heads", 16),
            "num_v_heads": ("value_heads", None),
            "head_dim": ("head_width", 128),
            "expand_v": ("expand_v", 1.0),
            "allow_neg_eigval": ("negative_eigenvalues", False),
            "lower_bound": ("log_decay_min", None),
        },
        {},
        short_conv=True,
    ),
    "transformer": Family(
        config.Attention,
        "Transformer",
        {
            "num_heads": ("heads", 32),
            "num_kv_heads": ("kv_heads", None),
            "qkv_bias": ("qkv_bias", False),
            "qk_norm": ("qk_norm", False),
            "window_size": ("window", None),
            "rope_theta": ("rope_theta", 10000.0),
        },
        {"rope_scaling": (None, "fla has dropped it"), "attention_dropout": (0.0, "fla has no dropout")},
    ),
}

SHARED = {  # option -> (the ModelConfig's field, fla's default); the depth and the MLP differ by family, see _shared
    "hidden_size": ("width", 2048),
    "num_hidden_layers": ("layers", None),
    "vocab_size": ("vocabulary", 32000),
    "hidden_ratio": ("mlp_ratio", None),
    "intermediate_size": ("mlp_width", None),
    "norm_eps": ("norm_eps", 1e-6),
    "initializer_range": ("init_std", 0.02),
    "tie_word_embeddings": ("tied", False),
}
REFUSED = {
    "hidden_act": ("swish", "the MLP and the output gates here are SiLU"),
    "attnres_block_size": (None, "there are no attention residuals here"),
    "use_l2warp": (False, "the training loss here has no L2 warp"),
    "norm_first": (False, "fla has dropped it"),
}
ATTENTION = {  # of a hybrid's full-attention layers: option -> (field, default)
    "num_heads": ("heads", None),
    "num_kv_heads": ("kv_heads", None),
    "qkv_bias": ("qkv_bias", False),
    "window_size": ("window", None),
    "rope_theta": ("rope_theta", 10000.0),
}
POSITIONS = ("window_size", "rope_theta")  # of full attention, a hybrid's or the Transformer's: what a run of given parameters may change
RENAMED = {  # by fla since
    "rms_norm_eps": "norm_eps",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "attention_bias": "qkv_bias",
}
# How fla computes, not what: its kernels' modes and fusions, the size of its first rotary table, an old convolution's backend.
NO_EFFECT = {
    "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "max_position_embeddings",
    "use_cache", "chunk_size", "elementwise_affine",
}  # fmt: skip
# What transformers writes into any model's configuration: names of classes and tokens, defaults of generation.
TRANSFORMERS = {
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "auto_map", "_name_or_path", "_commit_hash",
    "_attn_implementation_autoset", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads",
    "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "add_cross_attention",
    "tie_encoder_decoder", "finetuning_task", "id2label", "label2id", "tokenizer_class", "prefix", "task_specific_params",
    "problem_type", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
}  # fmt: skip


def family(options: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises ConfigError for any other model."""
    name = options.get("model_type")
    if name not in FAMILIES:
        raise ConfigError(f"model_type={name!r} is not supported: choose a model of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def modern(options: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's options under today's names, otherwise as they are.

    Raises ConfigError where an option is there under both its names with different values.
    """
    renamed = dict(options)
    for old, new in RENAMED.items():
        if old in renamed:
            value = renamed.pop(old)
            if renamed.setdefault(new, value) != value:
                raise ConfigError(f"config.json says {old}={value!r} and {new}={renamed[new]!r}, two names of one option: take one out")
    return renamed


def model_config(options: Mapping[str, Any], dtype: str) -> ModelConfig:
    """The ModelConfig, computing in ``dtype``, of a config.json under today's names (:func:`modern`).

    Raises ConfigError, naming the option, for one that is unknown, or whose value is not supported here.
    """
    kind = family(options)
    refused = REFUSED | kind.refused
    for name, (only, why) in refused.items():
        if options.get(name, only) != only:
            raise ConfigError(f"{name}={options[name]!r} is not supported: {why}; only {name}={only!r} is")
    hybrid = kind.mixer is not config.Attention
    known = {*SHARED, *refused, *kind.fields, *NO_EFFECT, *TRANSFORMERS, "num_heads"}
    known |= {"attn", "use_short_conv", "conv_size", "share_conv_kernel"} if hybrid else set()
    known |= {"safe_gate"} if kind.mixer is config.KDA else set()
    unknown = sorted(options.keys() - known)
    if unknown:
        name = unknown[0]
        raise ConfigError(f"{name}={options[name]!r} is not supported: it is no known option of fla's {kind.prefix} models")

    values = {field: options.get(name, default) for name, (field, default) in SHARED.items()}
    values["layers"] = options.get("num_hidden_layers", kind.layers)
    ratio = options.get("hidden_ratio", kind.hidden_ratio)
    values["mlp_ratio"] = 4.0 if ratio is None else ratio
    values["mixer"] = {"name": kind.mixer.name, **_mixer(kind, options)}
    attention, layers = _attention(options.get("attn"))
    values |= {"attention": attention, "attention_layers": layers} if layers else {}
    try:
        return from_dict(ModelConfig, values | {"dtype": dtype}, "model")
    except ConfigError as error:
        raise ConfigError(f"config.json gives a model that cannot be: {error}") from None


def _mixer(kind: Family, options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field: options.get(name, default) for name, (field, default) in kind.fields.items()}
    for field in ("feature_map", "gate_activation"):
        if fields.get(field) == "swish":  # fla's other name for it
            fields[field] = "silu"
    if kind.mixer is config.HGRN2:
        fields["expand_ratio"] = _key_width(options)
    if options.get("safe_gate") and options.get("lower_bound") is None:  # beside one it is how fla computes, and first draws A_log
        raise ConfigError("safe_gate=True needs lower_bound, by which fla's gate is safe: give one, such as lower_bound=-5")
    if "conv_width" in kind.mixer.__dataclass_fields__:
        used = options.get("use_short_conv", kind.short_conv)
        if used and options.get("share_conv_kernel"):
            raise ConfigError("share_conv_kernel=True is not supported: fla has dropped it; only share_conv_kernel=False is")
        fields["conv_width"] = options.get("conv_size", 4) if used else 0
    return fields


def _key_width(options: Mapping[str, Any]) -> int:
    """HGRN2's key width a head, which fla lets be given as a number of heads."""
    width, heads, ratio = options.get("hidden_size", 2048), options.get("num_heads"), options.get("expand_ratio", 128)
    if ratio is None:
        if not heads:
            raise ConfigError("expand_ratio=None needs num_heads: give one of them")
        return width // heads
    if heads is not None and heads != width // ratio:
        raise ConfigError(f"num_heads={heads} is not supported: expand_ratio={ratio} of hidden_size={width} makes {width // ratio} heads")
    return ratio


def _attention(attn: Any) -> tuple[dict[str, Any], list[int]]:
    """(the fields of full attention, its layers) of fla's ``attn``: None, one specification, or a list of them."""
    specifications = [attn] if isinstance(attn, Mapping) else attn or []
    if not isinstance(specifications, list) or not all(isinstance(one, Mapping) for one in specifications):
        raise ConfigError(f"attn={attn!r} is not supported: give null, one specification, or a list of them")
    read = []
    for one in specifications:
        unknown = sorted(one.keys() - ATTENTION.keys() - {"layers"})
        if unknown:
            known = ", ".join(["layers", *ATTENTION])
            raise ConfigError(f"attn.{unknown[0]}={one[unknown[0]]!r} is not supported: the known options are {known}")
        missing = sorted({"layers", "num_heads"} - one.keys())
        if missing:
            raise ConfigError(f"attn has no {missing[0]}, which fla needs")
        fields = {field: one.get(name, default) for name, (field, default) in ATTENTION.items()}
        read.append(fields | {"kv_heads": fields["kv_heads"] or fields["heads"]})
    for name, (field, _) in ATTENTION.items():
        if len({one[field] for one in read}) > 1:
            raise ConfigError(f"attn whose {name} differs from layer to layer is not supported: full-attention layers here are alike")
    return read[0] if read else {}, [layer for one in specifications for layer in one["layers"]]


def fla_options(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, with which fla builds the same; :func:`model_config` gives the model back.

    Raises ConfigError, naming the field, where fla has no such model.
    """
    named = {kind.mixer: name for name, kind in FAMILIES.items()}
    if type(model.mixer) not in named:
        raise ConfigError(f"model.mixer {model.mixer.name!r} cannot be written for fla, which has no such layer")
    name = named[type(model.mixer)]
    kind = FAMILIES[name]
    mixer = to_dict(model.mixer)
    options = {option: getattr(model, field) for option, (field, _) in SHARED.items()} | {"intermediate_size": model.mlp_hidden}
    options |= {option: mixer[field] for option, (field, _) in kind.fields.items()}
    if "conv_width" in mixer:
        options |= {"use_short_conv": mixer["conv_width"] > 0, "conv_size": mixer["conv_width"] or 4}
    if kind.mixer is config.KDA:  # fla's faster kernel, which takes no lower bound than this, and its first A_log of bounded gates
        options["safe_gate"] = model.mixer.log_decay_min is not None and model.mixer.log_decay_min >= -5.0
    full = [layer for layer, layer_kind in enumerate(model.layer_kinds) if layer_kind == "attention"]
    where = "mixer" if kind.mixer is config.Attention else "attention"
    if full and getattr(model, where).rope_theta is None:
        raise ConfigError(f"model.{where}.rope_theta=None cannot be written for fla, whose full attention always has rotary positions")
    if kind.mixer is not config.Attention:
        options["attn"] = None
        if full:
            if model.attention.qk_norm:
                raise ConfigError("model.attention.qk_norm=True cannot be written for fla: the full attention of its hybrids has no norm")
            options["attn"] = {"layers": full} | {option: getattr(model.attention, field) for option, (field, _) in ATTENTION.items()}
            options["attn"]["num_kv_heads"] = model.attention.kv_heads or model.attention.heads
    return {"architectures": [f"{kind.prefix}ForCausalLM"], "model_type": name, "fuse_norm": True} | options


def with_positions(options: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The options that a model came with, with the positions and the window that its full attention now has.

    Raises ConfigError where it has no positions, which fla's always has.
    """
    now = fla_options(model)

    def renewed(old: Mapping[str, Any], new: Mapping[str, Any], known: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
        return {**old, **{name: new[name] for name in POSITIONS if old.get(name, known[name][1]) != new[name]}}

    if isinstance(model.mixer, config.Attention):
        return renewed(options, now, family(options).fields)
    attn = options.get("attn")
    if not attn:
        return dict(options)
    full = [renewed(one, now["attn"], ATTENTION) for one in ([attn] if isinstance(attn, Mapping) else attn)]
    return {**options, "attn": full[0] if isinstance(attn, Mapping) else full}
