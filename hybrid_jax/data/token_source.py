"""What the pipeline reads from: a long row of tokens and where its documents end."""

import abc
import hashlib
from functools import cached_property

import numpy as np

from hybrid_jax.data import DataError
from hybrid_jax.data.tokenizers import Tokenizer


class TokenSource(abc.ABC):
    """One split: documents laid end to end, each closed by ``tokenizer.document_end``.

    Attributes:
        name: for messages.
        tokenizer: the one that made the tokens (`hybrid_jax.data.tokenizers`).
        documents: [documents] int64; document d is the tokens from ``documents[d - 1]`` (0 for the first) up to ``documents[d]``.
        bytes: the UTF-8 length of all the text, document ends not counted.
        fingerprint: equal for equal tokens.
    """

    name: str
    tokenizer: Tokenizer
    documents: np.ndarray
    bytes: int
    fingerprint: str

    @property
    def parts(self) -> list[tuple["TokenSource", float]]:
        """The sources that it is mixed of, end to end, and each one's share of the rows; itself alone where it is no `mix.Mix`."""
        return [(self, 1.0)]

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of tokens, document ends included."""

    @abc.abstractmethod
    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        """The tokens of every ``(start, stop)``, fetched together."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] unsigned integers: the tokens from ``start`` up to ``stop``."""
        return self.read_ranges([(start, stop)])[0]

    def check_vocabulary(self, model_vocabulary: int) -> None:
        """Raise `DataError` unless every token of the source is below ``model_vocabulary``."""
        if self.tokenizer.vocabulary > model_vocabulary:
            raise DataError(
                f"{self.name} holds tokens of a vocabulary of {self.tokenizer.vocabulary}, the model has {model_vocabulary}: "
                f"set the model's vocabulary to at least {self.tokenizer.vocabulary}, or give another source"
            )


class ArraySource(TokenSource):
    """Documents held in memory as one array of tokens."""

    def __init__(self, tokens: np.ndarray, documents: np.ndarray, *, tokenizer: Tokenizer, bytes: int, name: str):
        self.tokens, self.documents = tokens, np.asarray(documents, np.int64)
        self.tokenizer, self.bytes, self.name = tokenizer, bytes, name

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        return [self.tokens[start:stop] for start, stop in ranges]
