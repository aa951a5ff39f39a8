"""Named shapes of the short convolution, shared by tests and benchmarks: DeltaNet's q, k and v together, Gated DeltaNet's one by one."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """x [B,T,D], weight [D,W]."""

    B: int
    T: int
    D: int
    W: int = 4


SHAPES = {
    "tiny": Shape(B=2, T=96, D=32),
    "delta_net_340m": Shape(B=1, T=2048, D=3072),
    "gated_delta_net_340m": Shape(B=1, T=2048, D=1024),
    "delta_net_1b3": Shape(B=1, T=2048, D=6144),
}


def inputs(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments of ``causal_conv``, by name."""
    keys = jax.random.split(key, 3)
    return {
        "x": jax.random.normal(keys[0], (shape.B, shape.T, shape.D), dtype),
        "weight": jax.random.normal(keys[1], (shape.D, shape.W), dtype) * shape.W**-0.5,
        "initial_state": jax.random.normal(keys[2], (shape.B, shape.W - 1, shape.D), dtype),
    }


def flops(shape: Shape) -> int:
    """FLOPs of a forward pass: a multiplication and an addition a tap."""
    return 2 * shape.B * shape.T * shape.D * shape.W


def bytes_moved(shape: Shape, dtype=jnp.float32) -> int:
    """Bytes a forward pass has to read and write: x and the output once, and weight and states."""
    size = jnp.dtype(dtype).itemsize
    state = shape.B * (shape.W - 1) * shape.D
    return 2 * shape.B * shape.T * shape.D * size + shape.D * shape.W * size + state * (size + 4)
