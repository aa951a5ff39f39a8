"""Several sources as one: laid end to end, each with its share of the rows that are trained on."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from hybrid_jax.data import DataError
from hybrid_jax.data.token_source import TokenSource


class Mix(TokenSource):
    """See `TokenSource`; ``parts`` are the sources and their shares, ``weights`` over their sum."""

    def __init__(self, sources: Sequence[TokenSource], weights: Sequence[float]):
        """Raises `DataError` where two sources have tokens of different tokenizers."""
        first = sources[0]
        for source in sources[1:]:
            if source.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise DataError(
                    f"{first.name} and {source.name} are of different tokenizers ({first.tokenizer.name}, {source.tokenizer.name}): "
                    "a mix needs one, build the stores with the same --tokenizer"
                )
        self._parts = [(source, weight / sum(weights)) for source, weight in zip(sources, weights, strict=True)]
        self.starts = np.cumsum([0, *map(len, sources)])  # of each part; and the end
        self.name = " + ".join(f"{share:.3g} of {source.name}" for source, share in self.parts)
        self.tokenizer, self.bytes = first.tokenizer, sum(source.bytes for source in sources)
        self.fingerprint = hashlib.sha256(repr([(source.fingerprint, share) for source, share in self.parts]).encode()).hexdigest()

    @property
    def parts(self) -> list[tuple[TokenSource, float]]:
        return self._parts

    @cached_property
    def documents(self) -> np.ndarray:
        return np.concatenate([source.documents + start for (source, _), start in zip(self.parts, self.starts[:-1], strict=True)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        found = [[] for _ in ranges]
        for (source, _), first, last in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            here = [(i, max(start, first) - first, min(stop, last) - first) for i, (start, stop) in enumerate(ranges)]
            here = [(i, int(start), int(stop)) for i, start, stop in here if start < stop]
            for (i, *_), tokens in zip(here, source.read_ranges([(start, stop) for _, start, stop in here]), strict=True):
                found[i].append(tokens)
        return [np.concatenate(pieces) if pieces else np.zeros(0, np.uint16) for pieces in found]
