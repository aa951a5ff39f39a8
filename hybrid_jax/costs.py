"""What a model costs, from its configuration alone: parameters, FLOPs a token, bytes of state and cache a sequence.

FLOPs are the model's own, the least that its equations take: two for each weight a token meets, the recurrent form of
each recurrence, and the causal half of attention's scores. What a chunked kernel or remat adds is not work of the model.
"""

import math
from collections import Counter

import jax
import numpy as np

from hybrid_jax import config
from hybrid_jax.config import ModelConfig

# FLOPs a token for each element of a recurrence's state: decay 1, write 2, read 2, the delta rule's look before it writes 2.
STATE_FLOPS = {"hgrn": 2, "retnet": 5, "gla": 5, "hgrn2": 5, "delta_net": 6, "gated_delta_net": 7, "kda": 7}


def parameters(model: ModelConfig) -> int:
    """The number of parameters, a tied matrix counted once."""
    from hybrid_jax.model import abstract

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model)[1]))


def state_elements(model: ModelConfig) -> int:
    """Elements of one layer's recurrent state: H * K * V, or HGRN's one vector."""
    match model.mixer:
        case config.HGRN(expand_ratio=ratio):
            return model.width * ratio
        case config.HGRN2(expand_ratio=K):
            return model.width * K
        case config.GatedDeltaNet() | config.KDA() as m:
            return (m.value_heads or m.heads) * m.head_width * int(m.head_width * m.expand_v)
        case config.Attention():
            return 0
        case m:
            return int(model.width * m.expand_k) * int(model.width * m.expand_v) // m.heads


def convolution_channels(model: ModelConfig) -> int:
    """Channels that pass a short convolution in one layer of the mixer."""
    m = model.mixer
    if not getattr(m, "conv_width", 0):
        return 0
    match m:
        case config.HGRN():
            return 2 * model.width * m.expand_ratio
        case config.HGRN2():
            return 3 * model.width
        case config.GLA():
            kv_share = (m.kv_heads or m.heads) / m.heads
            return int(model.width * (m.expand_k * (1 + kv_share) + m.expand_v * kv_share))
        case config.GatedDeltaNet() | config.KDA():
            return m.head_width * (2 * m.heads + int((m.value_heads or m.heads) * m.expand_v))
        case config.DeltaNet():
            return int(model.width * (2 * m.expand_k + m.expand_v))


def state_bytes(model: ModelConfig) -> int:
    """Bytes of recurrent state (float32) and convolution tails (compute dtype) of one sequence, whatever its length."""
    linear = sum(kind != "attention" for kind in model.layer_kinds)
    taps = max(getattr(model.mixer, "conv_width", 0) - 1, 0)
    return linear * (4 * state_elements(model) + _itemsize(model) * taps * convolution_channels(model))


def cache_bytes(model: ModelConfig, context: int) -> int:
    """Bytes of keys and values (compute dtype) of one sequence of ``context`` tokens."""
    attention = model.full_attention
    full = sum(kind == "attention" for kind in model.layer_kinds)
    kept = min(context, attention.window or context)
    return full * 2 * kept * model.width * (attention.kv_heads or attention.heads) // attention.heads * _itemsize(model)


def flops_per_token(model: ModelConfig, window: int) -> float:
    """FLOPs of one forward pass over ``window`` tokens, a token; training takes three times as many."""
    kinds = Counter(model.layer_kinds)
    full = kinds.pop("attention", 0)
    lookup = 0 if model.tied else model.vocabulary * model.width  # an untied embedding is read, not multiplied
    weights = 2 * (parameters(model) - lookup)
    recurrences = sum(STATE_FLOPS[kind] * count for kind, count in kinds.items()) * state_elements(model)
    seen = min(window, model.full_attention.window or window)
    mean_context = seen - seen * (seen - 1) / (2 * window)  # keys a query sees, averaged over the window
    return weights + recurrences + full * 4 * mean_context * model.width


def _itemsize(model: ModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" else np.dtype(model.dtype).itemsize
