"""From the name of a source in a config to its two splits."""

from collections.abc import Mapping

from hybrid_jax.data import embedded
from hybrid_jax.data.mix import Mix
from hybrid_jax.data.store import TokenStore
from hybrid_jax.data.token_source import TokenSource
from hybrid_jax.data.tokenizers import Tokenizer


def make_sources(source: str, tokenizer: Tokenizer | None = None) -> tuple[TokenSource, TokenSource]:
    """The training and the held-out split of ``source``: "stdlib", or a token store's folder or bucket URL.

    tokenizer: the one that came with the model, if any, with which "stdlib" is made tokens; a store has its own.

    Raises `DataError` where there is no finished token store, or one without a validation split.
    """
    if source == "stdlib":
        return embedded.standard_library(tokenizer=tokenizer)
    return TokenStore.open(source, "train"), TokenStore.open(source, "validation")


def mixed_sources(weights: Mapping[str, float], tokenizer: Tokenizer | None = None) -> tuple[TokenSource, TokenSource]:
    """The same of several sources, {source: weight}, each split a `Mix`; of one, its own two. Raises `DataError` as these do."""
    splits = [make_sources(source, tokenizer) for source in weights]
    return splits[0] if len(splits) == 1 else tuple(Mix(sources, list(weights.values())) for sources in zip(*splits, strict=True))
