"""Configurations: to plain values and back, and every refusal in one clear line."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import config

LINEAR = [mixer() for mixer in config.MIXERS.values() if mixer is not config.Attention]


@given(
    st.sampled_from([*LINEAR, config.GLA(log_decay_min=-1.0), config.KDA(log_decay_min=-5.0)]),
    st.sampled_from([None, 24, 12, 6, 3]),
    st.booleans(),
    st.integers(1, 10**6),
)
def test_round_trip(mixer, ratio, tied, steps):
    run = config.RunConfig(
        model=config.ModelConfig(mixer=mixer, ratio=ratio, tied=tied),
        train=config.TrainConfig(steps=steps),
        evaluation=config.EvaluationConfig(every=7),
    )
    assert config.from_dict(config.RunConfig, config.to_dict(run)) == run


def test_explicit_layers_round_trip_as_a_list():
    run = config.from_dict(config.RunConfig, {"model": {"mixer": {"name": "gla"}, "attention_layers": [0, 7]}})
    assert run.model.attention_layers == (0, 7)
    assert run.model.layer_kinds[:2] == ("attention", "gla")


REFUSED = [
    ({"modle": {}}, "config has no field 'modle'; did you mean 'model'"),
    ({"model": {"colour": 1}}, "config.model has no field 'colour'; it has mixer"),
    ({"model": {"width": "wide"}}, "config.model.width='wide' must be of type int"),
    ({"model": {"width": True}}, "config.model.width=True must be of type int"),
    ({"model": {"tied": 1}}, "config.model.tied=1 must be of type bool"),
    ({"model": 3}, "config.model=3 must be a group of fields"),
    ({"model": {"dtype": "float8"}}, "must be one of 'bfloat16', 'float32'"),
    ({"model": {"attention_layers": "3"}}, "must be a list of integers"),
    ({"model": {"mixer": {"name": "mamba"}}}, "is no mixer; choose one of hgrn"),
    ({"model": {"mixer": {"name": "gla", "heads": 3}}}, "gla heads=3 must divide width * expand_k"),
    ({"model": {"mixer": {"name": "hgrn2", "expand_ratio": 100}}}, "must divide model.width=1024"),
    ({"model": {"mixer": {"name": "retnet", "kv_heads": 3}}}, "retnet kv_heads=3 must divide heads=8"),
    ({"model": {"mixer": {"name": "gated_delta_net", "value_heads": 6}}}, "heads=4 must divide value_heads=6"),
    ({"model": {"mixer": {"name": "delta_net", "conv_width": 1}}}, "must be 0 (none) or at least 2"),
    ({"model": {"mixer": {"name": "kda", "value_heads": 12}}}, "kda heads=8 must divide value_heads=12"),
    ({"model": {"mixer": {"name": "kda", "expand_v": 0.3}}}, "kda expand_v=0.3 gives a value width of 38.4"),
    ({"model": {"mixer": {"name": "kda", "log_decay_min": 0}}}, "kda log_decay_min=0.0 must be negative"),
    ({"model": {"mixer": {"name": "kda", "conv_width": -1}}}, "kda conv_width=-1 must be 0 (none) or at least 2"),
    ({"model": {"attention": {"kv_heads": 0}, "ratio": 6}}, "attention kv_heads=0 must divide heads=16 (None: as many)"),
    ({"model": {"mixer": {"name": "gla", "kv_heads": 0}}}, "gla kv_heads=0 must divide heads=4 (None: as many)"),
    ({"model": {"mixer": {"name": "gated_delta_net", "value_heads": 0}}}, "value_heads=0 must be at least 1"),
    ({"model": {"mixer": {"name": "gla", "log_decay_min": 1}}}, "gla log_decay_min=1.0 must be negative"),
    ({"model": {"mlp_ratio": 0}}, "model.mlp_ratio=0.0 must be positive"),
    ({"model": {"norm_eps": -1e-6}}, "model.norm_eps=-1e-06 must be positive"),
    ({"model": {"init_std": -0.02}}, "model.init_std=-0.02 must not be negative"),
    ({"model": {"ratio": 7}}, "does not divide layers=24; choose one of"),
    ({"model": {"ratio": 6, "attention_layers": [3]}}, "two ways to say one thing"),
    ({"model": {"attention_layers": [24]}}, "from 0 to 23"),
    ({"model": {"mixer": {"name": "attention"}, "ratio": 6}}, "is attention already"),
    ({"model": {"ratio": 6, "attention": {"heads": 15}}}, "heads=15 must divide model.width=1024"),
    ({"model": {"width": 1020, "mixer": {"name": "attention", "heads": 4}}}, "head width 255 must be even for rotary"),
    ({"model": {"ratio": 6, "attention": {"rope_theta": 0.0}}}, "rope_theta=0.0 must be above 0 (None: no positions)"),
    ({"model": {"layers": 0}}, "model.layers=0 must be at least 1"),
    ({"data": {"window": 1}}, "at least 2 tokens"),
    ({"data": {"source": "a=1,b=0"}}, "data.source='a=1,b=0' must name each source once, with a weight above 0"),
    ({"data": {"source": "a=1,a=0.5"}}, "must name each source once"),
    ({"data": {"window": 32, "mqar": {"share": 0.5}}}, "must fit in data.window=32"),
    ({"data": {"mqar": {"share": 1.0}}}, "must be in [0, 1)"),
    ({"train": {"steps": 0}}, "train.steps=0 must be at least 1"),
    ({"optimizer": {"name": "sgd"}}, "must be one of 'adamw'"),
    ({"train": {"seed": -1}}, "train.seed=-1 must not be negative"),
    ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate=0.0 must be positive"),
    ({"optimizer": {"eps": 0}}, "optimizer.eps=0.0 must be positive"),
    ({"optimizer": {"beta2": 1}}, "optimizer.beta2=1.0 must be in [0, 1)"),
    ({"optimizer": {"weight_decay": -0.1}}, "optimizer.weight_decay=-0.1 must not be negative"),
    ({"optimizer": {"name": "schedule_free", "beta1": 0}}, "schedule_free divides by it"),
    ({"optimizer": {"name": "schedule_free", "schedule": "wsd"}}, "optimizer.schedule='wsd' has no meaning under schedule_free"),
    ({"optimizer": {"schedule": "wsd"}}, "optimizer.decay_steps=None must be at least 1 for optimizer.schedule='wsd'"),
    ({"optimizer": {"decay_steps": 9}}, "optimizer.decay_steps=9 is of optimizer.schedule='wsd', and that is 'cosine'"),
    (
        {"optimizer": {"schedule": "wsd", "decay_steps": 9, "warmup_steps": 2}, "train": {"steps": 11}},
        "warmup_steps=2 and optimizer.decay_steps=9 together must be fewer than train.steps=11",
    ),
    ({"checkpoint": {"keep_every": 1500}}, "checkpoint.keep_every=1500 must be a multiple of checkpoint.every=1000"),
    ({"mesh": {"data": 0}}, "at least 1, or -1"),
    ({"mesh": {"data": -1}}, "only one axis can be -1"),
    ({"platform": "abacus"}, "must be one of 'any'"),
]


@pytest.mark.parametrize("values, says", REFUSED, ids=[says for _, says in REFUSED])
def test_refusals_name_the_field_in_one_line(values, says):
    with pytest.raises(config.ConfigError, match=re.escape(says)) as error:
        config.from_dict(config.RunConfig, values)
    assert "\n" not in str(error.value)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ModelConfig().width = 3
