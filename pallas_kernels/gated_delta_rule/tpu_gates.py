"""What beta and the decays of a head's tokens are to a chunk, made by the matrix unit inside a Mosaic TPU kernel.

A kernel needs c_i - c_j for every pair of tokens, c the running sums of the log decays, and beta_i and exp(c_i) in every lane of
token i's row. Broadcasts of columns keep a TPU's cross-lane unit busy for longer than all the rest takes; but each of these is a
product of bfloat16 factors, for a float32 number x is the sum of three of them:

    c_i - c_j = [c_i parts, 1, 1, 1] [1, 1, 1, -c_j parts]^T        x_i = [x_i parts] [1, 1, 1]^T

c itself has two parts, the running sums of the log decays rounded to sixteenths and those of the small rests, each with a product
of its own: sums of the first are exact in float32 in any order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.tpu import LANES

HEADS = 8  # the most that a step of the grid takes: rows of a register


class Gates(NamedTuple):
    """Of one head of a chunk, float32; those [C,128] have a token's value in all lanes.

    between: [C,C], exp(c_i - c_j) for j <= i, else 0.
    beta, since_start: [C,128], beta_i and exp(c_i).
    until_end: [C,128], exp(c_C - c_j), where asked for; across: [1,C], the same as a row.
    total: [1,1], exp(c_C).
    """

    between: jax.Array
    beta: jax.Array
    since_start: jax.Array
    until_end: jax.Array | None
    across: jax.Array
    total: jax.Array


def gates(rows: jax.Array, heads: int, until_end: bool) -> list[Gates]:
    """``rows`` [3*8,C]: a row a head, beta and the two parts of c, each padded to 8 rows."""
    C = rows.shape[1]
    beta, coarse, fine = (rows[n * HEADS : (n + 1) * HEADS] for n in range(3))
    coarse_end, fine_end = coarse[:, C - 1 :], fine[:, C - 1 :]
    across = jnp.exp((coarse_end - coarse) + (fine_end - fine))
    since_start = jnp.exp(coarse + fine)
    spread = [beta, since_start, across] if until_end else [beta, since_start]

    parts = [_parts(x) for x in (coarse, fine, *spread)]
    ones, zeros = [jnp.ones_like(beta)] * 3, [jnp.zeros_like(beta)] * 3
    none = zeros * len(parts)
    left = jnp.concatenate([*ones, *(part for x in parts for part in x)], axis=0).astype(jnp.bfloat16)  # [K,C]
    owner = jax.lax.broadcasted_iota(jnp.int32, (left.shape[0], 1), 0) % HEADS
    right = []
    for n, x in enumerate(parts):
        added = [-part for part in x] if n < 2 else zeros
        right.append(jnp.concatenate([*added, *none[: 3 * n], *ones, *none[3 * n + 3 :]], axis=0)[:, : C if n < 2 else LANES])
    right = jnp.concatenate(right, axis=1)  # [K,2C+128n]
    right = jnp.concatenate([jnp.where(owner == h, right, 0) for h in range(heads)], axis=1).astype(jnp.bfloat16)
    found = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    width, each = found.shape[1] // heads, []
    for h in range(heads):
        own = found[:, h * width : (h + 1) * width]
        log_between = own[:, :C] + own[:, C : 2 * C]
        values = [own[:, 2 * C + n * LANES : 2 * C + (n + 1) * LANES] for n in range(len(spread))]
        each.append(
            Gates(
                between=jnp.exp(jnp.where(i >= j, log_between, -jnp.inf)),
                beta=values[0],
                since_start=values[1],
                until_end=values[2] if until_end else None,
                across=across[h : h + 1],
                total=since_start[h : h + 1, C - 1 :],
            )
        )
    return each


def _parts(x: jax.Array) -> list[jax.Array]:
    """Three float32 arrays, exact in bfloat16, that add up to the float32 ``x``."""
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - parts[-1]
    return parts
