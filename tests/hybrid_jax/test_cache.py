"""What a model remembers: prompts of any length, then token by token, are one full forward; and its size is what costs.py says."""

import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import config, costs
from hybrid_jax.model import abstract
from pallas_kernels import platforms
from tests.helpers import relative_error, tree_errors
from tests.hybrid_jax.test_model import FAMILIES, OPTIONS, build, random_tokens

pytestmark = pytest.mark.usefixtures("one_device")
T, SPLITS = 37, (1, 5, 17, 36)  # a row of T tokens is read up to its split, padded on the left, and then goes on token by token
HYBRID = dict(layers=2, ratio=2, attention=config.Attention(heads=4, kv_heads=2))
PURE = dict(layers=2, ratio=None)
HYBRIDS = {f"{name} hybrid": (mixer, HYBRID) for name, mixer in FAMILIES.items()}
LAYOUTS = {
    **{name: HYBRIDS.pop(name) for name in ("hgrn hybrid", "retnet hybrid", "gla hybrid", "gated_delta_net hybrid")},
    "transformer, windowed": (config.Attention(heads=4, kv_heads=2, qk_norm=True, window=9), PURE),
}
MORE_LAYOUTS = {
    **HYBRIDS,
    **{f"{name} pure": (mixer, PURE) for name, mixer in FAMILIES.items()},
    **{name: (mixer, PURE) for name, mixer in OPTIONS.items() if "conv" in name or "grouped" in name or "shared" in name},
    "transformer": (config.Attention(heads=2), PURE),
    "windowed hybrid": (config.GLA(heads=2), HYBRID | dict(attention=config.Attention(heads=2, window=5))),
    "two stages": (config.HGRN(), dict(layers=5, ratio=None, attention_layers=(0, 3), attention=config.Attention(heads=2))),
    "repeats": (config.HGRN(), dict(layers=4, ratio=2, attention=config.Attention(heads=2))),
}


def padded(tokens, starts, stops):
    """Row by row tokens[start:stop], on the right of [B,T], and which of them are real."""
    rows, real = np.zeros((len(starts), T), np.int32), np.zeros((len(starts), T), bool)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        rows[row, T - (stop - start) :], real[row, T - (stop - start) :] = tokens[row, start:stop], True
    return rows, real


def check(mixer, layout):
    model = build(mixer, seed=2, **layout)
    tokens = np.asarray(random_tokens(len(SPLITS), T, seed=2))
    expected = np.asarray(model(tokens))

    @jax.jit
    def extend(tokens, real, cache):
        hidden, cache = model.extend(tokens, real, cache)
        return model.logits(hidden), cache

    slots = (model.config.full_attention.window or 0) + 40  # with a window the rings go round in two chunks
    nothing = model.empty_cache(len(SPLITS), slots)

    found = np.zeros_like(expected)
    starts = np.zeros(len(SPLITS), int)
    rows, real = padded(tokens, starts, SPLITS)
    logits, cache = extend(rows, real, nothing)
    for row, split in enumerate(SPLITS):
        found[row, :split] = logits[row, T - split :]
    for at in range(T - 1):
        place = np.array(SPLITS) + at
        real = place < T  # rows that are done are passed over
        logits, cache = extend(tokens[np.arange(len(SPLITS)), np.minimum(place, T - 1)][:, None], real[:, None], cache)
        for row in np.flatnonzero(real):
            found[row, place[row]] = logits[row, 0]
    # float32, the same sums in another order, through two layers or more
    assert relative_error(found, expected) < 1e-5

    # The same by two chunks, the second where the first left each row, and by one: also in what is remembered.
    logits, halves = extend(*padded(tokens, starts, SPLITS), nothing)
    logits, halves = extend(*padded(tokens, SPLITS, [T] * len(SPLITS)), halves)
    for row, split in enumerate(SPLITS):
        assert relative_error(logits[row, split:], expected[row, split:]) < 1e-5
    _, whole = extend(tokens, np.ones_like(tokens, bool), nothing)
    for other in (cache, halves):
        assert other.lengths.tolist() == [T] * len(SPLITS)
        assert max(tree_errors(other.stages, whole.stages).values()) < 1e-5


@pytest.mark.parametrize("mixer, layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_prefill_and_steps_are_one_forward(mixer, layout):
    check(mixer, layout)


def test_layers_one_after_the_other_remember_the_same(monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    check(*MORE_LAYOUTS["repeats"])


@pytest.mark.slow
@pytest.mark.parametrize("mixer, layout", MORE_LAYOUTS.values(), ids=MORE_LAYOUTS.keys())
def test_more_layouts(mixer, layout):
    check(mixer, layout)


@pytest.mark.parametrize(
    "mixer",
    [
        *(config.RetNet(), config.GLA(conv_width=4), config.DeltaNet(), config.GatedDeltaNet(), config.HGRN()),
        *(config.KDA(4, 8, expand_v=2.0), config.HGRN(expand_ratio=2, conv_width=4), config.HGRN2(conv_width=3)),
        config.GLA(heads=4, kv_heads=2, expand_k=1.0, conv_width=4),
    ],
)
def test_the_cache_is_of_the_size_that_costs_say(mixer):
    model = config.ModelConfig(mixer=mixer, ratio=6, vocabulary=64, attention=config.Attention(heads=16, kv_heads=4))
    cache = jax.eval_shape(lambda params: nnx.merge(abstract(model)[0], params).empty_cache(3, 1000), abstract(model)[1])
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.stages))
    assert size == 3 * (costs.state_bytes(model) + costs.cache_bytes(model, 1000))
