"""The operators at shapes whose rings of memory are gone around, each run and compared as its tests of the kernels do."""

from functools import partial
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_delta_rule import gpu as delta_rule_kernels
from pallas_kernels.gated_linear_attention import gpu_walk
from tests.helpers import random_segment_ids
from tests.pallas_kernels import (
    hopper,
    test_attention_gpu,
    test_causal_conv_gpu,
    test_gated_delta_rule_gpu,
    test_gated_linear_attention_gpu,
    test_linear_scan_gpu,
)
from tests.pallas_kernels.ptx import emulated


def run(name: str, dumps: Path, seed: int = 0, change=None) -> None:
    """AssertionError where a kernel does what it must not, or is too far from the reference. change: as in :func:`.emulated.kernels`."""
    keywords = {} if change is None else {"change": change}
    with mock.patch.object(hopper, "kernels", partial(emulated.kernels, dumps, seed, **keywords)):
        CASES[name]()


def _documents(B, T, mean_length=50.0):
    return random_segment_ids(np.random.default_rng(T), B, T, mean_length)


def _linear_scan(dtype, B, T, D, segment_ids=None):
    found = test_linear_scan_gpu.found_errors(test_linear_scan_gpu.example(0, B, T, D, segment_ids), segment_ids, dtype)
    assert max(found.values()) < test_linear_scan_gpu.BOUND[dtype], found


def _causal_conv(dtype, B, T, D, segment_ids=None):
    test_causal_conv_gpu.check(test_causal_conv_gpu.example(0, B, T, D, 4, dtype), segment_ids)


def _attention(B, T, H, HK, K, V, **options):
    test_attention_gpu.check(test_attention_gpu.example(0, B, T, H, HK, K, V), **options)


def _gated_linear_attention(T, axes, least=None, **sizes):
    case = test_gated_linear_attention_gpu.Case(T, axes, **{"documents": True, "B": 1, "H": 1, "HV": 1, "K": 64, "V": 64} | sizes)
    with mock.patch.object(gpu_walk, "LEAST", least or gpu_walk.LEAST):
        test_gated_linear_attention_gpu._matches_the_reference(case)


def _gated_delta_rule(T, axes, least=None, **sizes):
    case = test_gated_delta_rule_gpu.Case(T, axes, **{"documents": True, "B": 1, "H": 1, "HV": 2, "K": 64, "V": 64} | sizes)
    with mock.patch.object(delta_rule_kernels, "LEAST", least or delta_rule_kernels.LEAST):
        found = test_gated_delta_rule_gpu.errors(case)
    assert max(found.values()) < 1e-2, found  # as in test_in_pieces


CASES = {
    "linear_scan": lambda: _linear_scan(jnp.float32, 1, 300, 130),
    "linear_scan in pieces": lambda: _linear_scan(jnp.bfloat16, 2, 600, 130, _documents(2, 600)),
    "causal_conv": lambda: _causal_conv(jnp.float32, 1, 100, 256),
    "causal_conv of documents": lambda: _causal_conv(jnp.bfloat16, 2, 100, 130, _documents(2, 100)),
    "attention": lambda: _attention(1, 600, 2, 1, 64, 64, programs=3, segment_ids=_documents(1, 600, 200.0)),
    "attention in a window": lambda: _attention(1, 700, 1, 1, 128, 64, programs=4, window=300),
    "attention of wide heads": lambda: _attention(1, 300, 1, 1, 128, 128, programs=2, segment_ids=_documents(1, 300)),
    "gated_linear_attention by head": lambda: _gated_linear_attention(640, "head"),
    "gated_linear_attention by channel": lambda: _gated_linear_attention(300, "channel", K=128, V=128),
    "gated_linear_attention of medium decays": lambda: _gated_linear_attention(64, "channel", K=128, decays="medium", documents=False),
    "gated_linear_attention by head in pieces": lambda: _gated_linear_attention(1024, "head", least=4),
    "gated_linear_attention by channel in pieces": lambda: _gated_linear_attention(512, "channel", least=1),
    "gated_delta_rule by head": lambda: _gated_delta_rule(640, "head", K=128, V=128),
    "gated_delta_rule by channel": lambda: _gated_delta_rule(300, "channel", K=128),
    "gated_delta_rule of medium decays": lambda: _gated_delta_rule(64, "channel", K=128, HV=1, decays="medium", documents=False),
    "gated_delta_rule by head in pieces": lambda: _gated_delta_rule(600, "head", least=3),
    "gated_delta_rule by channel in pieces": lambda: _gated_delta_rule(300, "channel", least=1),
}
