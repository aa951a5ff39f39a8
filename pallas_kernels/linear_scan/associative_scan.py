"""h_t = a_t * h_{t-1} + x_t as an associative scan: (a, x) then (b, y) is (a b, b x + y)."""
import jax

from pallas_kernels.linear_scan.vjp import solve


def linear_scan(decay: jax.Array, x: jax.Array, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """decay, x [B,T,D] and initial_state [B,D] of one dtype -> (h [B,T,D], final state [B,D])."""
    h = solve(_associative, decay, x, initial_state)
    return h, h[:, -1]


def _associative(decay: jax.Array, x: jax.Array, initial_state: jax.Array, reverse: bool) -> jax.Array:
    def then(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    product, h = jax.lax.associative_scan(then, (decay, x), reverse=reverse, axis=1)
    return h + product * initial_state[:, None]
