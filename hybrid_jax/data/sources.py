"""From the name of a source in a config to its two splits."""

from hybrid_jax.data import embedded
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
