"""Named shapes of gated linear attention, shared by tests and benchmarks: the models of the study, at both of its sizes."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """q, k [B,T,H,K], v [B,T,H,V]; decay: "fixed" [H], "head" [B,T,H] or "channel" [B,T,H,K]."""

    B: int
    T: int
    H: int
    K: int
    V: int
    decay: str


SHAPES = {
    "tiny_fixed": Shape(B=2, T=96, H=2, K=16, V=32, decay="fixed"),
    "tiny_head": Shape(B=2, T=96, H=2, K=16, V=32, decay="head"),
    "tiny_channel": Shape(B=2, T=96, H=2, K=16, V=32, decay="channel"),
    "simple_gla_340m": Shape(B=1, T=2048, H=8, K=128, V=128, decay="head"),
    "simple_gla_4k": Shape(B=1, T=4096, H=8, K=128, V=128, decay="head"),
    "retnet_340m": Shape(B=1, T=2048, H=8, K=128, V=256, decay="fixed"),
    "retnet_1b3": Shape(B=1, T=2048, H=8, K=256, V=512, decay="fixed"),
    "gla_340m": Shape(B=1, T=2048, H=4, K=128, V=256, decay="channel"),
    "gla_1b3": Shape(B=1, T=2048, H=4, K=256, V=512, decay="channel"),
    "gla_4k": Shape(B=1, T=4096, H=8, K=128, V=128, decay="channel"),
    "hgrn2_340m": Shape(B=1, T=2048, H=8, K=128, V=128, decay="channel"),
    "hgrn2_1b3": Shape(B=1, T=2048, H=16, K=128, V=128, decay="channel"),
}


def inputs(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments of ``gated_linear_attention``, by name; gates as RetNet's, or logsigmoid / 16 as GLA's."""
    keys = jax.random.split(key, 5)
    B, T, H, K, V = shape.B, shape.T, shape.H, shape.K, shape.V
    if shape.decay == "fixed":
        log_decay = jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(H)))
    else:
        axes = {"head": (B, T, H), "channel": (B, T, H, K)}[shape.decay]
        log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[3], axes)) / 16
    return {
        "q": jax.random.normal(keys[0], (B, T, H, K), dtype),
        "k": jax.random.normal(keys[1], (B, T, H, K), dtype),
        "v": jax.random.normal(keys[2], (B, T, H, V), dtype),
        "log_decay": log_decay,
        "initial_state": jax.random.normal(keys[4], (B, H, K, V)),
    }


def flops(shape: Shape) -> int:
    """FLOPs of a forward pass by the matmuls of chunks of 64 tokens: the scores, their product with v, and the state's two."""
    K, V = shape.K, shape.V
    return 2 * shape.B * shape.T * shape.H * (64 * K + 64 * V + 2 * K * V)


def bytes_moved(shape: Shape, dtype=jnp.float32) -> int:
    """Bytes a forward pass has to read and write: q, k, v and the output once, and the float32 decays and states."""
    B, T, H, K, V = shape.B, shape.T, shape.H, shape.K, shape.V
    decays = {"fixed": H, "head": B * T * H, "channel": B * T * H * K}[shape.decay]
    return 2 * B * T * H * (K + V) * jnp.dtype(dtype).itemsize + 4 * decays + 8 * B * H * K * V
