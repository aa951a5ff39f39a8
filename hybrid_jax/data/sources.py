"""From the name of a source in a config to its two splits."""

from hybrid_jax.data import embedded
from hybrid_jax.data.store import TokenStore
from hybrid_jax.data.token_source import TokenSource


def make_sources(source: str) -> tuple[TokenSource, TokenSource]:
    """The training and the held-out split of ``source``: "stdlib", or a token store's folder or bucket URL.

    Raises `DataError` where there is no finished token store, or one without a validation split.
    """
    if source == "stdlib":
        return embedded.standard_library()
    return TokenStore.open(source, "train"), TokenStore.open(source, "validation")
