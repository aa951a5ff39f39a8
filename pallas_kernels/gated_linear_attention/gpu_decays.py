"""What decays a channel make of the tokens of a chunk of 64, inside of a Mosaic GPU kernel.

Pairs of tokens are split by the middle of the smallest block of 2, 4, ..., 64 tokens that holds both, as :mod:`.decays` has it: each
token meets the middle through a decay of its own, at most 1, and the pairs of a level are one product. The sums of log decays are
products too, with zeros and ones that say over which tokens; for that, log decays are two parts in bfloat16, to twice its precision.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_linear_attention.gpu_layout import TILE, over_rows, product
from pallas_kernels.gated_linear_attention.tpu_decays import RESET

CHUNK = TILE
LEVELS = 6  # at which tokens meet: in the middles of blocks with halves of 1, 2, 4, ..., 32


def prepared(log_decay: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The two parts of log decays [B,T,HV,K], no less than RESET, in bfloat16, and the decays [B,N,HV,K] of whole chunks."""
    B, T, HV, K = log_decay.shape
    log_decay = jnp.maximum(log_decay, RESET)
    total = jnp.exp(jnp.sum(log_decay.reshape(B, T // CHUNK, CHUNK, HV, K), axis=2))
    return parts_by_xla(log_decay), total


def parts_by_xla(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`parts` outside of a kernel, where XLA takes a cast to bfloat16 and back for none, and so would leave nothing to the second."""
    coarse = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return coarse.astype(jnp.bfloat16), (x - coarse).astype(jnp.bfloat16)


def parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two parts in bfloat16 that add up to float32 x, but for 2^-17 of it."""
    coarse = x.astype(jnp.bfloat16)
    return coarse, (x - coarse.astype(jnp.float32)).astype(jnp.bfloat16)


def split(log_decay_smem, coarse_smem, fine_smem) -> jax.Array:
    """Puts log decays [C,64], no less than RESET, into their two parts; returns their sums over the tokens [64], by both."""
    log_decay = jnp.maximum(log_decay_smem[...], RESET)
    coarse_smem[...], fine_smem[...] = parts(log_decay)
    return jnp.sum(log_decay, axis=0)


def positions() -> tuple[jax.Array, jax.Array]:
    """The rows and columns of [C,C]."""
    # Rows are broadcast: what is computed of one alone, a thread then computes once.
    return over_rows(lax.broadcasted_iota(jnp.int32, (CHUNK,), 0), CHUNK), lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)


def meet(i, j, s) -> jax.Array:
    """Whether two tokens are in the two halves, of s tokens, of one block."""
    return ((i ^ j) & -s) == s


def ones(where) -> jax.Array:
    return jnp.where(where, 1.0, 0.0).astype(jnp.bfloat16)


def decay_over(over, log_decay) -> jax.Array:
    """[C,64], exp of the sums of the log decays, two parts in shared memory, for token i over the tokens t where ``over`` [C,C]."""
    over = ones(over)
    return jnp.exp(product(over, log_decay[0], over, log_decay[1]))


def to_middle(log_decay, s) -> jax.Array:
    """[C,64], the decay of each token to or from the middle of its block with halves of s tokens."""
    i, t = positions()
    second = (i & s) != 0
    first, last = jnp.where(second, i & -s, i + 1), jnp.where(second, i, i | (s - 1))
    return decay_over((t >= first) & (t <= last), log_decay)
