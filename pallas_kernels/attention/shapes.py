"""Named shapes of attention, shared by tests and benchmarks; the models' are those of the study's full-attention layers."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Shape:
    """q [B,T,H,K], k [B,T,HK,K], v [B,T,HK,V]; so many documents in each row, as long as one another."""

    B: int
    T: int
    H: int
    HK: int
    K: int
    V: int
    documents: int = 1


SHAPES = {
    "tiny": Shape(B=2, T=96, H=4, HK=2, K=16, V=24),
    "transformer_340m": Shape(B=1, T=2048, H=16, HK=16, K=64, V=64),
    "transformer_1b3": Shape(B=1, T=2048, H=32, HK=32, K=64, V=64),
    "packed_340m": Shape(B=1, T=2048, H=16, HK=16, K=64, V=64, documents=4),
    "h8k128": Shape(B=1, T=2048, H=8, HK=8, K=128, V=128),
}


def inputs(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments of ``attention``, by name."""
    keys = jax.random.split(key, 3)
    sizes = {"q": (shape.H, shape.K), "k": (shape.HK, shape.K), "v": (shape.HK, shape.V)}
    values = {name: jax.random.normal(k, (shape.B, shape.T, *size), dtype) for k, (name, size) in zip(keys, sizes.items(), strict=True)}
    if shape.documents > 1:
        values["segment_ids"] = jnp.asarray(np.tile(document_of_token(shape), (shape.B, 1)), jnp.int32)
    return values


def document_of_token(shape: Shape) -> np.ndarray:
    """[T]: 1 for the tokens of a row's first document, 2 for those of the next."""
    return np.arange(shape.T) * shape.documents // shape.T + 1


def flops(shape: Shape) -> int:
    """FLOPs of a forward pass: q k^T and weights v, over the causal half of each document."""
    lengths = np.bincount(document_of_token(shape))
    pairs = int(np.sum(lengths * (lengths + 1) // 2))
    return 2 * shape.B * shape.H * pairs * (shape.K + shape.V)


def bytes_moved(shape: Shape, dtype=jnp.float32) -> int:
    """Bytes a forward pass has to read and write: q, k, v and the output, once."""
    width = shape.H * (shape.K + shape.V) + shape.HK * (shape.K + shape.V)
    return shape.B * shape.T * width * jnp.dtype(dtype).itemsize
