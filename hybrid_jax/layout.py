"""Which layers of a stack are full attention, and how the stack folds into scans.

The study names a hybrid by a ratio r. Its released weights have one full-attention layer every r layers; its prose
says r linear layers, then one of full attention. Both readings are here; so is any explicit list.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple


def attention_layers(layers: int, ratio: int | None, reading: str = "every") -> tuple[int, ...]:
    """The 0-based full-attention layers of a stack of ``layers``.

    ratio: None for none of them. reading: "every" puts attention at each ``ratio``-th layer (r - 1 linear, then one;
    r must divide ``layers``); "after" puts it after each ``ratio`` linear layers, any remainder being linear.
    Raises ValueError for a ratio that leaves the reading impossible.
    """
    if ratio is None:
        return ()
    if ratio < 1:
        raise ValueError(f"ratio={ratio} must be at least 1 (None: no full attention)")
    period = ratio if reading == "every" else ratio + 1
    if reading == "every" and layers % ratio:
        divisors = [d for d in range(2, layers + 1) if layers % d == 0]
        raise ValueError(f"ratio={ratio} does not divide layers={layers}; choose one of {divisors}, or another number of layers")
    if period > layers:
        raise ValueError(f"ratio={ratio} leaves no full-attention layer among layers={layers}; it needs {period} or more")
    return tuple(range(period - 1, layers, period))


def layer_kinds(layers: int, full: Iterable[int], mixer: str) -> tuple[str, ...]:
    """Each layer's mixer by name: "attention" at the layers in ``full``, ``mixer`` elsewhere. Raises ValueError for a bad list."""
    full = tuple(full)
    wrong = [layer for layer in full if not 0 <= layer < layers]
    if wrong or len(set(full)) != len(full):
        raise ValueError(f"attention_layers={list(full)} must be distinct layers from 0 to {layers - 1}")
    return tuple("attention" if layer in full else mixer for layer in range(layers))


class Run(NamedTuple):
    """``length`` consecutive layers of one ``kind``, an inner scan."""

    kind: str
    length: int


class Stage(NamedTuple):
    """``repeats`` times the same ``runs`` one after the other, an outer scan; ``first`` is its first layer."""

    first: int
    repeats: int
    runs: tuple[Run, ...]

    @property
    def period(self) -> int:
        """Layers in one repeat."""
        return sum(run.length for run in self.runs)

    def layers(self, run: int) -> list[list[int]]:
        """The layers of the ``run``-th run, [repeats][length], in the order of its stacked parameters."""
        start = self.first + sum(r.length for r in self.runs[:run])
        return [[start + repeat * self.period + i for i in range(self.runs[run].length)] for repeat in range(self.repeats)]


def stages(kinds: tuple[str, ...]) -> tuple[Stage, ...]:
    """Fold layers into as few scans as their pattern allows.

    Consecutive layers of a kind make a run; a pair of runs that repeats makes a stage; so "every 6th of 24" is one
    stage of 4 x (5 linear, 1 attention), and compile time follows the pattern, not the depth.
    """
    runs = [Run(kind, len(list(group))) for kind, group in groupby(kinds)]
    folded: list[Stage] = []
    layer = 0
    while runs:
        pair, repeats = tuple(runs[:2]), 1
        while tuple(runs[2 * repeats : 2 * repeats + 2]) == pair:
            repeats += 1
        if repeats == 1:  # nothing repeats from here: the run stands alone, and the next pair may do better
            pair = pair[:1]
        stage = Stage(layer, repeats, pair)
        folded.append(stage)
        layer += repeats * stage.period
        del runs[: repeats * len(pair)]
    return tuple(folded)
