"""Text to batches: tokenizers, the token store, the embedded default, recall problems, and the pipeline over them.

Nothing in this folder but `pipeline.py` needs JAX, so the processes that tokenize start fast.
"""


class DataError(ValueError):
    """What is wrong with an input, a tokenizer, a store or a request for batches, and what to do about it, in one line."""
