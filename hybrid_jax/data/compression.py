"""What a model's bits per byte are held against: a general-purpose compressor and a model of single tokens."""

import lzma

import numpy as np

from hybrid_jax.data.token_source import TokenSource

BLOCK = 1 << 24


def baselines(train: TokenSource, held_out: TokenSource) -> dict[str, float]:
    """Bits per byte of ``held_out``'s text: ``{"xz -9": ..., "unigram": ...}``.

    "xz -9" is the size of what that command makes of the documents laid end to end (it is not told where they end);
    "unigram" is the cross-entropy of every token, document ends included as for a model, under the frequencies in ``train``
    with one added to each count.
    """
    return {"xz -9": xz_bits_per_byte(_text(held_out)), "unigram": unigram_bits_per_byte(train, held_out)}


def xz_bits_per_byte(text: bytes) -> float:
    """The size of ``text`` after `xz -9`, in bits per byte of it."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def unigram_bits_per_byte(train: TokenSource, held_out: TokenSource) -> float:
    """The cross-entropy of ``held_out`` under the token frequencies of ``train``, in bits per byte of its text."""
    frequencies = _counts(train) + 1.0
    return float(-_counts(held_out) @ np.log2(frequencies / frequencies.sum()) / held_out.bytes)


def _counts(source: TokenSource) -> np.ndarray:
    counts = np.zeros(source.tokenizer.vocabulary, np.int64)
    for start in range(0, len(source), BLOCK):
        counts += np.bincount(source.read(start, min(len(source), start + BLOCK)), minlength=len(counts))
    return counts


def _text(source: TokenSource) -> bytes:
    starts = np.concatenate([[0], source.documents[:-1]])
    if source.tokenizer.name == "bytes":
        tokens = source.read(0, len(source))
        return tokens[tokens < 256].astype(np.uint8).tobytes()  # as they are: decoding would mend what is not UTF-8
    ranges = list(zip(starts, source.documents, strict=True))
    return b"".join(source.tokenizer.decode(ids).encode() for ids in source.read_ranges(ranges))
