"""What a model's bits per byte are to be held against: a general compressor, and letters without order."""

import lzma

import numpy as np


def xz_bits_per_byte(text: bytes) -> float:
    """Of ``xz -9``, which learns from the very text it compresses."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def unigram_bits_per_byte(text: bytes) -> float:
    """Of the best model of single bytes: the entropy of their frequencies in ``text`` itself."""
    counts = np.bincount(np.frombuffer(text, np.uint8))
    frequencies = counts[counts > 0] / len(text)
    return float(-(frequencies * np.log2(frequencies)).sum())
