"""What the decays of a head's tokens are to a chunk, made by the matrix unit inside a Mosaic TPU kernel.

A kernel needs c_i - c_j for every pair of tokens, c the running sums of the log decays, and exp(c_i) in every lane of token i's row.
Broadcasts of columns keep a TPU's cross-lane unit busy for longer than all the rest takes; but each of these is a product of
bfloat16 factors, for a float32 number x is the sum of three of them:

    c_i - c_j = [c_i parts, 1, 1, 1] [1, 1, 1, -c_j parts]^T        x_i = [x_i parts] [1, 1, 1]^T

c itself has two parts, the running sums of the log decays rounded to sixteenths and those of the small rests, each with a product
of its own: sums of the first are exact in float32 in any order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.tpu_decays import LANES, dot

HEADS = 8  # the most that a step of the grid takes: rows of a register


class Gates(NamedTuple):
    """Of one head of a chunk, float32; those [C,128] have a token's value in all lanes.

    between: [C,C], exp(c_i - c_j) for j <= i, else 0.
    beta: [1,C], beta_j.
    since_start: [C,128], exp(c_i).
    until_end: [1,C], exp(c_C - c_j).
    write: [C,128], beta_j exp(c_C - c_j), where asked for.
    total: [1,1], exp(c_C).
    """

    between: jax.Array
    beta: jax.Array
    since_start: jax.Array
    until_end: jax.Array
    write: jax.Array | None
    total: jax.Array


def gates(rows: jax.Array, heads: int, write: bool) -> list[Gates]:
    """``rows`` [3*8,C]: a row a head, beta and the two parts of c, each padded to 8 rows."""
    C = rows.shape[1]
    beta, coarse, fine = (rows[n * HEADS : (n + 1) * HEADS] for n in range(3))
    until_end = jnp.exp((coarse[:, C - 1 :] - coarse) + (fine[:, C - 1 :] - fine))
    since_start = jnp.exp(coarse + fine)
    parts = [_parts(x) for x in (coarse, fine, since_start, beta * until_end)]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))

    found = []
    for h in range(heads):
        own = [[part[h : h + 1] for part in x] for x in parts]
        ones, zeros = [jnp.ones((1, C), jnp.float32)] * 3, [jnp.zeros((1, C), jnp.float32)] * 3
        left = [*ones, *own[0], *own[1], *own[2], *own[3]]
        right = [[-x for x in own[0]] + ones + zeros * 3, [-x for x in own[1]] + zeros + ones + zeros * 2]
        right += [zeros * 3 + ones + zeros, zeros * 4 + ones][: 1 + write]
        left, *right = (jnp.concatenate([*x, zeros[0]], axis=0).astype(jnp.bfloat16) for x in (left, *right))
        right = [x[:, : C if n < 2 else LANES] for n, x in enumerate(right)]
        found.append(dot(left, jnp.concatenate(right, axis=1), (0, 0)))
    return [
        Gates(
            between=jnp.exp(jnp.where(i >= j, own[:, :C] + own[:, C : 2 * C], -jnp.inf)),
            beta=beta[h : h + 1],
            since_start=own[:, 2 * C : 2 * C + LANES],
            until_end=until_end[h : h + 1],
            write=own[:, 2 * C + LANES :] if write else None,
            total=since_start[h : h + 1, C - 1 :],
        )
        for h, own in enumerate(found)
    ]


def _parts(x: jax.Array) -> list[jax.Array]:
    """Three float32 arrays, exact in bfloat16, that add up to the float32 ``x``."""
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - parts[-1]
    return parts
