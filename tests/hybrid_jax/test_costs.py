"""Costs of the study's models, against its own table and against counting by hand."""

import pytest

from hybrid_jax import config, costs

# Recurrent floats a layer at 1.3B, and the KV cache in bfloat16 at 4096 tokens, by ratio.
STATES = [
    (config.HGRN(), 2048),
    (config.HGRN2(), 262144),
    (config.DeltaNet(heads=16), 262144),
    (config.KDA(heads=16), 262144),
    (config.GLA(), 524288),
    (config.GatedDeltaNet(heads=8), 524288),
    (config.RetNet(), 1048576),
]


@pytest.mark.parametrize("mixer, elements", STATES)
def test_state_of_a_layer(mixer, elements):
    model = config.ModelConfig(mixer=mixer, width=2048)
    assert mixer.state_elements(model.width) == elements
    tail = 3 * 3 * 2048 if getattr(mixer, "conv_width", 0) else 0
    assert costs.state_bytes(model) == 24 * (4 * elements + 2 * tail)


@pytest.mark.parametrize("ratio, megabytes", [(None, 0), (24, 34), (12, 67), (6, 134), (3, 268)])
def test_cache_by_ratio(ratio, megabytes):
    model = config.ModelConfig(mixer=config.GLA(), attention=config.Attention(heads=32), width=2048, ratio=ratio)
    assert round(costs.cache_bytes(model, 4096) / 1e6) == megabytes


def test_cache_of_a_window_stops_growing():
    model = config.ModelConfig(mixer=config.Attention(heads=16, kv_heads=4, window=100))
    assert costs.cache_bytes(model, 50) == 24 * 2 * 50 * 256 * 2
    assert costs.cache_bytes(model, 5000) == 24 * 2 * 100 * 256 * 2


def test_flops_of_a_token_of_kda():
    kda = config.KDA(heads=2, value_heads=4, head_width=6, expand_v=2.0, conv_width=3)
    model = config.ModelConfig(mixer=kda, layers=1, width=32, vocabulary=50, mlp_width=40, tied=True)
    projections = 32 * (2 * 12 + 48 + 4) + 48 * 32  # q, k, v, beta; output
    gates = 32 * 12 + 12 * 24 + 4 + 24 + 32 * 12 + 12 * 48 + 48  # decay in, out, A, dt; gate in, out, bias
    weights = projections + gates + 3 * (2 * 12 + 48) + 12 + 2 * 32 + 3 * 32 * 40 + 32 + 50 * 32
    assert costs.parameters(model) == weights
    assert costs.flops_per_token(model, 100) == 2 * weights + 7 * 4 * 6 * 12
    assert costs.state_bytes(model) == 4 * 4 * 6 * 12 + 2 * 2 * (2 * 12 + 48)


def test_flops_of_a_token():
    model = config.ModelConfig(
        mixer=config.GLA(heads=2), attention=config.Attention(heads=2), layers=2, width=32, ratio=2, vocabulary=50, mlp_width=40
    )
    projections = 2 * 32 * 16 + 3 * 32 * 32 + 32 * 16 + 16 * 16 + 16  # GLA: q, k; v, gate, output; decay in, out, bias
    vectors = 16 + 2 * 2 * 32 + 32  # one norm a head, two a block, the last
    weights = projections + 4 * 32 * 32 + 2 * 3 * 32 * 40 + vectors + 50 * 32
    assert costs.parameters(model) == weights + 50 * 32
    attention = 4 * 32 * (1 + 2 + 3 + 4) / 4  # each query's keys, over a window of 4
    assert costs.flops_per_token(model, 4) == 2 * weights + 5 * 2 * 8 * 16 + attention


DECAY, WRITE, READ, LOOK = 1, 2, 2, 2  # FLOPs of an element of a state: a product, or products that are added up


@pytest.mark.parametrize(
    "mixer, flops",
    [
        (config.HGRN(), DECAY + 1),  # what is written is no product of two vectors, and read as it is
        (config.HGRN2(expand_ratio=8), DECAY + WRITE + READ),
        (config.RetNet(heads=2), DECAY + WRITE + READ),
        (config.GLA(heads=2), DECAY + WRITE + READ),
        (config.DeltaNet(heads=2), LOOK + WRITE + READ),  # without a decay
        (config.GatedDeltaNet(heads=2, head_width=8), DECAY + LOOK + WRITE + READ),
        (config.KDA(heads=2, head_width=8), DECAY + LOOK + WRITE + READ),
    ],
)
def test_flops_of_a_recurrence(mixer, flops, monkeypatch):
    monkeypatch.setattr(costs, "parameters", lambda model: 0)  # what is left is no product with weights
    model = config.ModelConfig(mixer=mixer, layers=3, width=32, tied=True)
    assert costs.flops_per_token(model, 100) == 3 * flops * mixer.state_elements(32)


def test_flops_of_attention_in_a_sliding_window(monkeypatch):
    """A query sees its window's keys at most: of 1 + 2 + 3 + 4 + 5 of them 1 + 2 + 3 + 3 + 3."""
    monkeypatch.setattr(costs, "parameters", lambda model: 0)
    whole, sliding = (config.ModelConfig(mixer=config.Attention(heads=2, window=w), layers=2, width=32) for w in (None, 3))
    fewer = costs.flops_per_token(whole, 5) - costs.flops_per_token(sliding, 5)
    assert fewer == pytest.approx(2 * 4 * 32 * (15 - 12) / 5)
    assert costs.flops_per_token(whole, 3) == costs.flops_per_token(sliding, 3)
