"""What decays a channel make of the tokens of a chunk of 64, inside of a Mosaic GPU kernel.

Pairs of tokens are split by the middle of the smallest block of 2, 4, ..., 64 tokens that holds both, as :mod:`.decays` has it: each
token meets the middle through a decay of its own, at most 1, and the pairs of a level are one product. The sums of log decays are
products too, with zeros and ones that say over which tokens; for that, log decays are two parts in bfloat16, to twice its precision,
and to base 2: what is computed of powers of two is computed of all others by a product more.

Where the decays between the middle of the chunk and every one of its tokens are powers that bfloat16 holds with room to spare, and so are
their inverses, all pairs of the chunk are one product in place of six: each token meets the middle of the chunk, those that are read
through the inverse of a decay if they come after it, and those that read through one if they come before it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_linear_attention.gpu_layout import TILE, over_rows, product
from pallas_kernels.gated_linear_attention.tpu_decays import NEAR, RESET

CHUNK = TILE
LEVELS = 6  # at which tokens meet: in the middles of blocks with halves of 1, 2, 4, ..., 32


def parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two parts in bfloat16 that add up to float32 x, but for 2^-17 of it."""
    coarse = x.astype(jnp.bfloat16)
    return coarse, (x - coarse.astype(jnp.float32)).astype(jnp.bfloat16)


def split(log_decay_smem, coarse_smem, fine_smem) -> jax.Array:
    """Puts log decays [C,64], no less than RESET, to base 2, into their two parts; returns the decays of the whole chunk [64]."""
    log_decay = jnp.maximum(log_decay_smem[...], RESET) * math.log2(math.e)
    coarse_smem[...], fine_smem[...] = parts(log_decay)
    return jnp.exp2(jnp.sum(log_decay, axis=0))


def positions() -> tuple[jax.Array, jax.Array]:
    """The rows and columns of [C,C]."""
    # Rows are broadcast: what is computed of one alone, a thread then computes once.
    return over_rows(lax.broadcasted_iota(jnp.int32, (CHUNK,), 0), CHUNK), lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)


def among(t, first, count) -> jax.Array:
    """Whether t is among the ``count`` tokens from ``first`` on: one comparison, of numbers without a sign."""
    return (t - first).astype(jnp.uint32) < count.astype(jnp.uint32)


def meet(i, j, s) -> jax.Array:
    """Whether two tokens are in the two halves, of s tokens, of one block."""
    return among(j, (i & -s) ^ s, s)


def ones(where) -> jax.Array:
    return jnp.where(where, 1.0, 0.0).astype(jnp.bfloat16)


def _sum_over(over, log_decay) -> jax.Array:
    """[C,64], the log decay of token i over the tokens t where ``over`` [C,C], by its two parts in shared memory."""
    over = ones(over)
    return product(over, log_decay[0], over, log_decay[1])


def decay_over(over, log_decay) -> jax.Array:
    return jnp.exp2(_sum_over(over, log_decay))


def _sum_to_middle(log_decay, s) -> jax.Array:
    i, t = positions()
    second = (i & s) != 0
    first, end = jnp.where(second, i & -s, i + 1), jnp.where(second, i + 1, (i | (s - 1)) + 1)
    return _sum_over(among(t, first, end - first), log_decay)


def to_middle(log_decay, s) -> jax.Array:
    """[C,64], the decay of each token to or from the middle of its block with halves of s tokens."""
    return jnp.exp2(_sum_to_middle(log_decay, s))


def since_middle(log_decay) -> tuple[jax.Array, jax.Array]:
    """x [C,64], the sums of log decays since the middle of the chunk, before it less than none: of tokens i and j the decay between them is
    exp2(x_i - x_j). And whether all are near enough for exp2(x_i) and exp2(-x_j) to be factors."""
    half = CHUNK // 2
    x = _sum_to_middle(log_decay, half) * jnp.where((positions()[0] & half) != 0, 1.0, -1.0)
    return x, jnp.max(jnp.max(jnp.maximum(x, -x), axis=1)) <= NEAR
