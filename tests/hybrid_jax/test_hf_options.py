"""Each option of fla's configurations is honoured, of no effect, or refused by its name."""

import dataclasses

import pytest

from hybrid_jax import config
from hybrid_jax.config import ConfigError, ModelConfig
from hybrid_jax.hf.options import fla_options, model_config, modern, with_positions
from tests.hybrid_jax import hf_folders
from tests.hybrid_jax.hf_folders import ATTN


def read(model_type, **changes):
    return model_config(modern(hf_folders.fla_options(model_type, **changes)), "float32")


REFUSED = [
    ("gla", {"use_gv": True}, "use_gv=True is not supported"),
    ("gla", {"use_gk": False}, "use_gk=False is not supported"),
    ("gla", {"hidden_act": "powlu"}, "hidden_act='powlu' is not supported"),
    ("gla", {"attnres_block_size": 2}, "attnres_block_size=2 is not supported"),
    ("gla", {"use_l2warp": True}, "use_l2warp=True is not supported"),
    ("gla", {"feature_map": "dpfp"}, "model.mixer.feature_map='dpfp' must be one of"),
    ("gla", {"gate_low_rank_dim": 8}, "gate_low_rank_dim=8 is not supported: it is no known option of fla's GLA models"),
    ("gla", {"quantization_config": {}}, "quantization_config=.* is not supported"),
    ("gla", {"use_short_conv": True, "share_conv_kernel": True}, "share_conv_kernel=True is not supported"),
    ("gla", {"num_heads": 3}, "gla heads=3 must divide"),
    ("hgrn2", {"num_heads": 3}, "num_heads=3 is not supported: expand_ratio=16 of hidden_size=32 makes 2 heads"),
    ("hgrn2", {"expand_ratio": None}, "expand_ratio=None needs num_heads"),
    ("retnet", {"use_short_conv": True}, "use_short_conv=True is not supported"),
    ("delta_net", {"use_output_norm": False}, "use_output_norm=False is not supported"),
    ("delta_net", {"norm_first": True}, "norm_first=True is not supported"),
    ("delta_net", {"qk_norm": "max"}, "qk_norm='max' must be one of"),
    ("kda", {"safe_gate": True}, "safe_gate=True needs lower_bound"),
    ("kda", {"lower_bound": 1.0}, "kda log_decay_min=1.0 must be negative"),
    ("kda", {"num_v_heads": 3}, "kda heads=2 must divide value_heads=3"),
    ("kda", {"conv_bias": True}, "conv_bias=True is not supported: it is no known option of fla's KDA models"),
    ("gated_deltanet", {"safe_gate": True, "lower_bound": -5.0}, "lower_bound=-5.0 is not supported: it is no known option"),
    ("transformer", {"rope_scaling": {"type": "linear"}}, "rope_scaling=.* is not supported"),
    ("transformer", {"attn": ATTN}, "attn=.* is not supported: it is no known option of fla's Transformer"),
    ("hgrn", {"attn": "all"}, "attn='all' is not supported"),
    ("hgrn", {"attn": {"layers": [1], "num_heads": 2, "qk_norm": True}}, "attn.qk_norm=True is not supported"),
    ("hgrn", {"attn": {"layers": [1]}}, "attn has no num_heads"),
    ("hgrn", {"attn": {"layers": [9], "num_heads": 2}}, "must be distinct layers from 0 to 3"),
    ("hgrn", {"attn": [ATTN, {"layers": [0], "num_heads": 2, "window_size": 4}]}, "attn whose window_size differs from layer to layer"),
    ("hgrn", {"rms_norm_eps": 1e-5, "norm_eps": 1e-6}, "rms_norm_eps=1e-05 and norm_eps=1e-06, two names of one option"),
    ("mamba2", {}, "model_type='mamba2' is not supported: choose a model of hgrn, hgrn2, retnet"),
]


@pytest.mark.parametrize("model_type, changes, told", REFUSED, ids=[f"{kind} {'-'.join(changes)}" for kind, changes, _ in REFUSED])
def test_refused_by_name(model_type, changes, told):
    with pytest.raises(ConfigError, match=told):
        model_config(
            modern({"model_type": model_type, **hf_folders.SMALL, **hf_folders.FAMILIES.get(model_type, {}), **changes}), "float32"
        )


def test_old_names_of_options():
    old = hf_folders.fla_options("transformer", rms_norm_eps=1e-5, num_attention_heads=8, num_key_value_heads=4, attention_bias=True)
    del old["num_heads"], old["num_kv_heads"]
    model = model_config(modern(old), "float32")
    assert (model.norm_eps, model.mixer) == (1e-5, config.Attention(heads=8, kv_heads=4, qkv_bias=True))


def test_fla_defaults_where_config_json_is_silent():
    model = model_config({"model_type": "gated_deltanet"}, "bfloat16")
    assert model == ModelConfig(mixer=config.GatedDeltaNet(heads=6, expand_v=2.0), layers=21, width=2048)
    kda = model_config({"model_type": "kda"}, "bfloat16")
    assert kda == ModelConfig(mixer=config.KDA(heads=16), layers=24, width=2048, norm_eps=1e-6)
    retnet = model_config({"model_type": "retnet"}, "bfloat16")
    assert (retnet.mlp_hidden, retnet.mixer) == (2816, config.RetNet(heads=8))
    assert model_config({"model_type": "gla", "hidden_ratio": None}, "bfloat16").mlp_hidden == 5632


def test_what_has_no_effect_is_read_over():
    plain = read("gla")
    assert plain == read("gla", attn_mode="fused_recurrent", fuse_norm=False, fuse_cross_entropy=False, max_position_embeddings=9)
    assert plain == read("gla", torch_dtype="float32", architectures=["GLAForCausalLM"], transformers_version="4.57", pad_token_id=2)
    assert plain == read("gla", auto_map={"AutoModel": "theirs.Code"})  # named, never imported


MODELS = {
    "hgrn": config.HGRN(expand_ratio=2, conv_width=3, lower_bound=False, norm_scale=False),
    "hgrn2": config.HGRN2(expand_ratio=8, lower_bound=False),
    "retnet": config.RetNet(heads=4, kv_heads=2, expand_v=1.0, output_gate=False, feature_map="relu"),
    "gla": config.GLA(heads=4, kv_heads=2, expand_k=1.0, log_decay_min=-0.5, conv_width=4, feature_map="silu"),
    "delta_net": config.DeltaNet(heads=4, output_gate=True, beta=False, qk_activation="elu", qk_norm="sum", conv_width=0),
    "gated_deltanet": config.GatedDeltaNet(heads=2, value_heads=4, head_width=8, gate_activation="sigmoid", negative_eigenvalues=True),
    "kda": config.KDA(heads=2, value_heads=4, head_width=8, expand_v=2.0, negative_eigenvalues=True, log_decay_min=-5.0),
    "transformer": config.Attention(heads=4, kv_heads=2, qkv_bias=True, qk_norm=True, window=9, rope_theta=500.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_our_models_written_for_fla_are_read_as_themselves(name):
    hybrid = {} if name == "transformer" else dict(attention_layers=(1, 2), attention=config.Attention(heads=4, kv_heads=2, window=5))
    model = ModelConfig(mixer=MODELS[name], layers=4, width=32, mlp_width=48, vocabulary=61, tied=True, **hybrid)
    written = fla_options(model)
    assert written["model_type"] == name
    assert model_config(written, "bfloat16") == model


@pytest.mark.parametrize("least, safe", [(None, False), (-5.0, True), (-0.5, True), (-5.5, False)])
def test_the_faster_kernel_of_fla_is_asked_for_where_it_can_be(least, safe):
    """It takes a lower bound from -5 on; none of it changes what is computed."""
    model = ModelConfig(mixer=config.KDA(log_decay_min=least), layers=2)
    written = fla_options(model)
    assert (written["lower_bound"], written["safe_gate"]) == (least, safe)
    assert model_config(written | {"safe_gate": False}, "bfloat16") == model_config(written, "bfloat16")


@pytest.mark.parametrize("field, value", [("qk_norm", True), ("rope_theta", None)])
def test_what_fla_has_not_is_not_written(field, value):
    attention = config.Attention(heads=2, **{field: value})
    with pytest.raises(ConfigError, match=f"model.attention.{field}={value} cannot be written for fla"):
        fla_options(ModelConfig(layers=4, width=32, ratio=2, mixer=config.GLA(heads=2), attention=attention))
    if field == "rope_theta":
        with pytest.raises(ConfigError, match="model.mixer.rope_theta=None cannot be written for fla"):
            fla_options(ModelConfig(layers=2, width=32, ratio=None, mixer=attention))
    assert fla_options(ModelConfig(layers=4, width=32, ratio=None, mixer=config.GLA(heads=2), attention=attention))["attn"] is None


@pytest.mark.parametrize("model_type", ["transformer", "gla"])
def test_a_longer_context_is_written_into_what_a_model_came_with(model_type):
    """And nothing else of it is touched."""
    full = [{"layers": [1], "num_heads": 2}, {"layers": [3], "num_heads": 2, "window_size": None}]
    came = hf_folders.fla_options(model_type, eos_token_id=7, **({} if model_type == "transformer" else {"attn": full}))
    model = model_config(came, "float32")
    assert with_positions(came, model) == came
    where = "mixer" if model_type == "transformer" else "attention"

    def changed(**fields):
        return dataclasses.replace(model, **{where: dataclasses.replace(getattr(model, where), **fields)})

    longer = {"rope_theta": 5e5, "window_size": 64}
    written = with_positions(came, changed(rope_theta=5e5, window=64))
    assert written == came | (longer if model_type == "transformer" else {"attn": [one | longer for one in full]})
    assert model_config(written, "float32") == changed(rope_theta=5e5, window=64)
    with pytest.raises(ConfigError, match="rope_theta=None"):
        with_positions(came, changed(rope_theta=None))
