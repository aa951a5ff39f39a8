"""Named shapes of the gated delta rule, shared by tests and benchmarks: the models of the study at both of its sizes, and KDA's."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """q, k [B,T,H,K], v [B,T,HV,V]; decay: "none", "head" [B,T,HV] or "channel" [B,T,HV,K]."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    decay: str


SHAPES = {
    "tiny_none": Shape(B=2, T=96, H=2, HV=2, K=16, V=32, decay="none"),
    "tiny_head": Shape(B=2, T=96, H=2, HV=4, K=16, V=32, decay="head"),
    "tiny_channel": Shape(B=2, T=96, H=2, HV=2, K=16, V=32, decay="channel"),
    "goal": Shape(B=1, T=2048, H=8, HV=8, K=128, V=128, decay="head"),
    "goal_4k": Shape(B=1, T=4096, H=8, HV=8, K=128, V=128, decay="head"),
    "delta_net_340m": Shape(B=1, T=2048, H=8, HV=8, K=128, V=128, decay="none"),
    "delta_net_1b3": Shape(B=1, T=2048, H=16, HV=16, K=128, V=128, decay="none"),
    "gated_delta_net_340m": Shape(B=1, T=2048, H=4, HV=4, K=256, V=256, decay="head"),
    "gated_delta_net_1b3": Shape(B=1, T=2048, H=8, HV=8, K=256, V=256, decay="head"),
    "kda_4k": Shape(B=1, T=4096, H=8, HV=8, K=128, V=128, decay="channel"),
    "kda_340m": Shape(B=1, T=2048, H=8, HV=8, K=128, V=128, decay="channel"),
    "kda_1b3": Shape(B=1, T=2048, H=16, HV=16, K=128, V=128, decay="channel"),
}


def inputs(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments of ``gated_delta_rule``, by name: unit q and k, beta in (0, 1), g = -A softplus(a + dt) as Gated DeltaNet starts."""
    keys = jax.random.split(key, 8)
    B, T, H, HV, K, V = shape.B, shape.T, shape.H, shape.HV, shape.K, shape.V

    def unit(key):
        x = jax.random.normal(key, (B, T, H, K))
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)

    arguments = {
        "q": unit(keys[0]),
        "k": unit(keys[1]),
        "v": jax.random.normal(keys[2], (B, T, HV, V), dtype),
        "beta": jax.nn.sigmoid(jax.random.normal(keys[3], (B, T, HV))),
        "initial_state": jax.random.normal(keys[4], (B, HV, K, V)),
    }
    if shape.decay != "none":
        axes = (HV,) if shape.decay == "head" else (HV, K)
        A = jax.random.uniform(keys[5], axes, maxval=16.0)
        dt = jnp.exp(jax.random.uniform(keys[6], axes, minval=jnp.log(1e-3), maxval=jnp.log(0.1)))
        dt_bias = dt + jnp.log(-jnp.expm1(-dt))
        arguments["log_decay"] = -A * jax.nn.softplus(jax.random.normal(keys[7], (B, T, *axes)) + dt_bias)
    return arguments


def flops(shape: Shape) -> int:
    """FLOPs of a forward pass by the matmuls of the WY form in chunks of 64 tokens: K K^T, Q K^T, T (beta K), T (beta V) and the scores
    times the updates inside a chunk; W S, Q S and K^T times the updates with the state."""
    C, K, V = 64, shape.K, shape.V
    return 2 * shape.B * shape.T * shape.HV * (C * (3 * K + 2 * V) + 3 * K * V)


def bytes_moved(shape: Shape, dtype=jnp.float32) -> int:
    """Bytes a forward pass has to read and write: q, k, v and the output once, and the float32 gates and states."""
    B, T, H, HV, K, V = shape.B, shape.T, shape.H, shape.HV, shape.K, shape.V
    gates = B * T * HV * (1 + {"none": 0, "head": 1, "channel": K}[shape.decay])
    return 2 * B * T * (H * K + HV * V) * jnp.dtype(dtype).itemsize + 4 * gates + 8 * B * HV * K * V
