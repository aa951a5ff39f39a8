"""The English words that needles and word counts are made of: the adjectives, nouns and verbs of the `wonderwords` package."""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

from hybrid_jax.data import DataError


@cache
def english_words(kind: str) -> list[str]:
    """The different words of ``kind`` ("adjective", "noun" or "verb"), sorted."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise DataError("RULER's words are those of the package wonderwords: pip install -e '.[eval]'") from None
    return sorted(set(RandomWord().filter(include_categories=[kind])))


class Keys(Sequence):
    """Every different "adjective-noun", sorted: six million strings, made when they are looked at."""

    def __init__(self):
        nouns, stems = english_words("noun"), defaultdict(list)
        for adjective in english_words("adjective"):
            stems[adjective.split("-")[0]].append(adjective)  # high-X and high-pitched-X are sorted among each other, others are not
        self._groups = [_Group(tuple(stems[stem]), nouns) for stem in sorted(stems, key=lambda stem: stem + "-")]
        self._ends = list(itertools.accumulate(map(len, self._groups)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect.bisect(self._ends, index)
        return self._groups[group][index - self._ends[group]]  # counted from the group's end


class _Group(Sequence):
    """The keys of adjectives that start alike."""

    def __init__(self, adjectives: tuple[str, ...], nouns: list[str]):
        self._prefix, self._rest = f"{adjectives[0]}-", nouns
        if len(adjectives) > 1:
            self._prefix, self._rest = "", sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, index: int) -> str:
        return self._prefix + self._rest[index]


@cache
def keys() -> Keys:
    """Made once."""
    return Keys()
