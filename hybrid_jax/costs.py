"""What a model costs, from its configuration alone: parameters, FLOPs a token, bytes of state and cache a sequence.

FLOPs are the model's own, the least that its equations take: two for each weight a token meets, the recurrent form of
each recurrence, and the causal half of attention's scores. What a chunked kernel or remat adds is not work of the model.
"""

import math

import jax
import numpy as np

from hybrid_jax.config import ModelConfig


def parameters(model: ModelConfig) -> int:
    """The number of parameters, a tied matrix counted once."""
    from hybrid_jax.model import abstract

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model)[1]))


def state_bytes(model: ModelConfig) -> int:
    """Bytes of recurrent state (float32) and convolution tails (compute dtype) of one sequence, whatever its length."""
    mixer, linear = model.mixer, sum(kind != "attention" for kind in model.layer_kinds)
    taps = max(getattr(mixer, "conv_width", 0) - 1, 0)
    tails = taps * mixer.convolution_channels(model.width)
    return linear * (4 * mixer.state_elements(model.width) + _itemsize(model) * tails)


def cache_bytes(model: ModelConfig, context: int) -> int:
    """Bytes of keys and values (compute dtype) of one sequence of ``context`` tokens."""
    attention = model.full_attention
    full = sum(kind == "attention" for kind in model.layer_kinds)
    kept = min(context, attention.window or context)
    return full * 2 * kept * model.width * (attention.kv_heads or attention.heads) // attention.heads * _itemsize(model)


def flops_per_token(model: ModelConfig, window: int) -> float:
    """FLOPs of one forward pass over ``window`` tokens, a token; training takes three times as many."""
    full = model.layer_kinds.count("attention")
    lookup = 0 if model.tied else model.vocabulary * model.width  # an untied embedding is read, not multiplied
    weights = 2 * (parameters(model) - lookup)
    recurrences = (model.layers - full) * model.mixer.state_flops * model.mixer.state_elements(model.width)
    seen = min(window, model.full_attention.window or window)
    mean_context = seen - seen * (seen - 1) / (2 * window)  # keys a query sees, averaged over the window
    return weights + recurrences + full * 4 * mean_context * model.width


def _itemsize(model: ModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" else np.dtype(model.dtype).itemsize
