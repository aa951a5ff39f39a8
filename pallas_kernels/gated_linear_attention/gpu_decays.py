"""What decays a channel make of the tokens of a chunk of 64, inside of a Mosaic GPU kernel.

Pairs of tokens are split by the middle of the smallest block of 2, 4, ..., 64 tokens that holds both, as :mod:`.decays` has it: each
token meets the middle through a decay of its own, at most 1, and the pairs of a level are one product. The sums of log decays are
products too, with zeros and ones that say over which tokens; for that, log decays are two parts in bfloat16, to twice its precision,
and to base 2: what is computed of powers of two is computed of all others by a product more.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_linear_attention.gpu_layout import TILE, over_rows, product
from pallas_kernels.gated_linear_attention.tpu_decays import RESET

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


def decay_over(over, log_decay) -> jax.Array:
    """[C,64], the decay of token i over the tokens t where ``over`` [C,C], by the two parts of the log decays in shared memory."""
    over = ones(over)
    return jnp.exp2(product(over, log_decay[0], over, log_decay[1]))


def to_middle(log_decay, s) -> jax.Array:
    """[C,64], the decay of each token to or from the middle of its block with halves of s tokens."""
    i, t = positions()
    second = (i & s) != 0
    first, end = jnp.where(second, i & -s, i + 1), jnp.where(second, i + 1, (i | (s - 1)) + 1)
    return decay_over(among(t, first, end - first), log_decay)
