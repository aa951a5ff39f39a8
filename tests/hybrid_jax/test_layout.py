"""Which layers are full attention, and how they fold into scans."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import layout


@pytest.mark.parametrize(
    "ratio, reading, expected",
    [
        (24, "every", [23]),
        (12, "every", [11, 23]),
        (6, "every", [5, 11, 17, 23]),
        (3, "every", [2, 5, 8, 11, 14, 17, 20, 23]),
        (3, "after", [3, 7, 11, 15, 19, 23]),
        (6, "after", [6, 13, 20]),
        (None, "every", []),
    ],
)
def test_the_studys_layouts(ratio, reading, expected):
    assert list(layout.attention_layers(24, ratio, reading)) == expected


@pytest.mark.parametrize(
    "layers, ratio, reading, says", [(24, 7, "every", "does not divide"), (24, 0, "every", "at least 1"), (6, 6, "after", "it needs 7")]
)
def test_impossible_ratios(layers, ratio, reading, says):
    with pytest.raises(ValueError, match=says):
        layout.attention_layers(layers, ratio, reading)


@given(st.lists(st.sampled_from(["gla", "attention"]), min_size=1, max_size=40))
def test_stages_unfold_to_the_layers(kinds):
    unfolded = {}
    for stage in layout.stages(tuple(kinds)):
        for i, run in enumerate(stage.runs):
            for repeat in stage.layers(i):
                assert len(repeat) == run.length
                unfolded |= dict.fromkeys(repeat, run.kind)
    assert [unfolded[layer] for layer in range(len(kinds))] == kinds


@pytest.mark.parametrize("layers, ratio", [(24, 3), (24, 6), (24, 12), (96, 12)])
def test_a_ratio_is_one_stage(layers, ratio):
    (stage,) = layout.stages(layout.layer_kinds(layers, layout.attention_layers(layers, ratio), "gla"))
    assert stage == layout.Stage(0, layers // ratio, (layout.Run("gla", ratio - 1), layout.Run("attention", 1)))
