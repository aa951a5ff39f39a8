"""Named shapes of the elementwise recurrence, shared by tests and benchmarks."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """decay and x [B,T,D]."""

    B: int
    T: int
    D: int


SHAPES = {
    "tiny": Shape(B=2, T=96, D=32),
    "hgrn_340m": Shape(B=1, T=2048, D=1024),
    "hgrn_1b3": Shape(B=1, T=2048, D=2048),
}


def inputs(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments of ``linear_scan``, by name, as HGRN makes them: decay = sigmoid(f) in float32, x = (1 - decay) * silu(i)."""
    keys = jax.random.split(key, 3)
    size = (shape.B, shape.T, shape.D)
    decay = jax.nn.sigmoid(2 + 2 * jax.random.normal(keys[0], size))
    x = (1 - decay) * jax.nn.silu(jax.random.normal(keys[1], size))
    state = jax.random.normal(keys[2], (shape.B, shape.D))
    return {"decay": decay, "x": x.astype(dtype), "initial_state": state}


def flops(shape: Shape) -> int:
    """FLOPs of a forward pass: a multiplication and an addition an element. The operator is bound by memory, not by these."""
    return 2 * shape.B * shape.T * shape.D


def bytes_moved(shape: Shape, dtype=jnp.float32) -> int:
    """Bytes a forward pass has to read and write: decay, x and the output once, and both float32 states."""
    return shape.B * shape.T * shape.D * (4 + 2 * jnp.dtype(dtype).itemsize) + 2 * shape.B * shape.D * 4
