"""What the tokens of a chunk are to each other, inside of a TPU kernel: decays a head and decays a channel.

A query i meets a key j <= i through the decay exp(g_{j+1} + ... + g_i). Neither kind takes it from a difference of rounded sums:

* per head, a running sum has two parts: that of the log decays rounded to sixteenths, which float32 adds up without any error,
  and that of the small rests;
* per channel, pairs are split by the middle of the smallest block of 2, 4, 8, ... tokens that holds both, as :mod:`.decays`
  has it: each meets the middle through a decay of its own tokens only, at most 1, and the pairs of a level are one product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LANES, SUBLANES = 128, 8
RESET = -1024.0  # the log decay of a new document's first token: exp of it is 0 in float32; sums over a chunk stay exact in sixteenths


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices over axis ``over`` of each, in float32."""
    return jax.lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def as_wide(x: jax.Array, width: int) -> jax.Array:
    """[C,128] with equal lanes -> [C,width], with no register moved."""
    return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x


class Decays(NamedTuple):
    """Of one head of a chunk, all float32; those [C,128] have a token's value in all lanes.

    between: [C,C], exp(c_i - c_j) for j <= i, else 0.
    since_start: [C,128], exp(c_i).
    until_end: [C,128], exp(c_C - c_j); across: [1,C], the same as a row.
    total: [1,1], exp(c_C).
    """

    between: jax.Array
    since_start: jax.Array
    until_end: jax.Array
    across: jax.Array
    total: jax.Array


def running_sums(log_decay: jax.Array, tokens: int) -> jax.Array:
    """log_decay [B,HV/G,G,T] -> [B,HV/G,2G,T]: the sums from a chunk's start up to and with each token, coarse and fine parts."""
    coarse = jnp.round(log_decay * 16) / 16
    parts = jnp.concatenate([coarse, log_decay - coarse], axis=2)
    chunks = parts.reshape(*parts.shape[:3], -1, tokens)
    upper = jnp.triu(jnp.ones((tokens, tokens), jnp.float32))
    return jnp.einsum("bhgnt,ti->bhgni", chunks, upper, precision=jax.lax.Precision.HIGHEST).reshape(parts.shape)


def per_head(sums: jax.Array) -> list[Decays]:
    """The :func:`running_sums` [2G,C] of a chunk -> the decays of each head."""
    G, C = sums.shape[0] // 2, sums.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    columns = sums.T  # [C,2G]
    heads = []
    for head in range(G):
        coarse_j, fine_j = sums[head : head + 1], sums[G + head : G + head + 1]
        coarse_i, fine_i = (jnp.broadcast_to(columns[:, g : g + 1], (C, LANES)) for g in (head, G + head))
        coarse_end, fine_end = coarse_j[:, C - 1 :], fine_j[:, C - 1 :]
        log_between = (as_wide(coarse_i, C) - coarse_j) + (as_wide(fine_i, C) - fine_j)
        heads.append(
            Decays(
                between=jnp.exp(jnp.where(i >= j, log_between, -jnp.inf)),
                since_start=jnp.exp(coarse_i + fine_i),
                until_end=jnp.exp((coarse_end - coarse_i) + (fine_end - fine_i)),
                across=jnp.exp((coarse_end - coarse_j) + (fine_end - fine_j)),
                total=jnp.exp(coarse_end + fine_end),
            )
        )
    return heads


class ChannelDecays(NamedTuple):
    """Of one head of a chunk, all [C,K] float32.

    to_middle: for halves of s = 1, 2, 4, ..., C/2 tokens, the decay from after token j of a block's first half to the middle, or
        from the middle to after token i of its second half.
    since_start: the decay from before the chunk to after token i. until_end: from after token j to the chunk's end.
    """

    to_middle: tuple[jax.Array, ...]
    since_start: jax.Array
    until_end: jax.Array


def level_of_pairs(C: int) -> jax.Array:
    """[C,C] int32: i ^ j for j <= i, else -1. A pair's smallest common block has halves of s tokens where s <= i ^ j < 2 s."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return jnp.where(i >= j, i ^ j, -1)


def spans(C: int) -> np.ndarray:
    """[5 C,C] zeros and ones: which tokens t the decay of token i is over, in blocks inside of a register.

    That to the middle of a block with halves of 1, 2 and 4 tokens, and, in blocks of 8, that since the start and until the end.
    """
    i, t = np.arange(C)[:, None], np.arange(C)

    def inside(s, after):  # the tokens t of i's block of s tokens that are after i, or not after
        return (i // s == t // s) & ((t > i) if after else (t <= i))

    to_middle = [np.where(i // s % 2 == 1, inside(s, False), inside(s, True)) for s in (1, 2, 4)]
    return np.concatenate([*to_middle, inside(SUBLANES, False), inside(SUBLANES, True)])


def per_channel(log_decay: jax.Array, spans: jax.Array) -> ChannelDecays:
    """log_decay [C,K] float32, finite, C a power of two; ``spans`` in bfloat16, for sums of twice its precision, or float32."""
    C = log_decay.shape[0]
    # Blocks inside a register: sums of log decays, by products with zeros and ones. The larger blocks: products of these.
    small = jnp.exp(sums(spans, log_decay))
    *to_middle, since_start, until_end = (small[n * C : (n + 1) * C] for n in range(5))

    since, until = ([x[n : n + SUBLANES] for n in range(0, C, SUBLANES)] for x in (since_start, until_end))
    while len(since) > 1:
        pairs = range(0, len(since), 2)
        to_middle.append(jnp.concatenate([x for n in pairs for x in (until[n], since[n + 1])]))
        until = [jnp.concatenate([until[n] * since[n + 1][-1:], until[n + 1]]) for n in pairs]
        since = [jnp.concatenate([since[n], since[n][-1:] * since[n + 1]]) for n in pairs]
    return ChannelDecays(tuple(to_middle), since[0], until[0])


def sums(which: jax.Array, x: jax.Array) -> jax.Array:
    """The product of zeros and ones [n,C] with float32 [C,K]; x in two parts where ``which`` is bfloat16."""
    if which.dtype == jnp.float32:
        return jax.lax.dot(which, x, precision=jax.lax.Precision.HIGHEST)
    coarse = x.astype(which.dtype)
    fine = (x - coarse.astype(jnp.float32)).astype(which.dtype)
    return dot(jnp.concatenate([which, which], axis=1), jnp.concatenate([coarse, fine]))
