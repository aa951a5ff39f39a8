"""Decays a channel of which none is far from the middle of its block of 64 tokens, inside of a TPU kernel.

The sum of the log decays from a token j to a later one i is a difference of two sums since the middle of their block, x_i - x_j, where x is
more than none before the middle. So all pairs of a block are one product, of q_i exp(x_i) and k_j exp(-x_j), of which what is above the
diagonal, whatever it comes to, is not taken. Factors are to be rounded as q and k themselves are, and no more: float32 and bfloat16, which
has the same exponents, hold powers from 2^-126 to 2^127; where no |x| is above :data:`NEAR`, in powers of two, 2^66 are left on either
side. Where one is, by strong decays or a document that starts, :class:`.ChannelDecays` are for that.

The first block's tokens meet the second one's through the decay from one middle to the other, which is at most 1.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.tpu_decays import LOG2E, NEAR, PART, Gradients, dot, sums


def are_near(log_decay: jax.Array) -> jax.Array:
    """Whether no token of log_decay [C,heads K] is far from the middle of its block: a scalar."""
    half = PART // 2
    halves = [jnp.sum(log_decay[n : n + half], axis=0, keepdims=True) for n in range(0, log_decay.shape[0], half)]
    while len(halves) > 1:
        halves = [jnp.minimum(a, b) for a, b in zip(halves[::2], halves[1::2], strict=True)]
    return jnp.min(halves[0]) >= -NEAR / LOG2E


class NearDecays(NamedTuple):
    """Of one head of a chunk of two blocks, all float32.

    since: [C,K], exp(x_i). until: [C,K], exp(-x_i).
    start, across, end: [1,K], the decay from before the chunk to the first block's middle, to the second one's, and to the chunk's end.
    """

    since: jax.Array
    until: jax.Array
    start: jax.Array
    across: jax.Array
    end: jax.Array

    @property
    def since_start(self) -> jax.Array:
        """[C,K], the decay from before the chunk to after token i."""
        return jnp.concatenate([self.since[:PART] * self.start, self.since[PART:] * (self.start * self.across)])

    @property
    def until_end(self) -> jax.Array:
        """[C,K], the decay from after token j to the chunk's end."""
        return jnp.concatenate([self.until[:PART] * (self.across * self.end), self.until[PART:] * self.end])

    @property
    def total(self) -> jax.Array:
        """[1,K], the decay of the whole chunk."""
        return self.start * self.across * self.end

    def scores(self, rows: list[jax.Array], k: jax.Array, dtype) -> Generator[None, None, list[jax.Array]]:
        """As :meth:`.ChannelDecays.scores`."""
        C, count = k.shape[0], len(rows)
        i, j = (jax.lax.broadcasted_iota(jnp.int32, (PART, C), axis) for axis in (0, 1))
        read = (k * self.until).astype(dtype)
        readers = [x * self.since for x in rows]
        at_first = [(x[PART:] * self.across).astype(dtype) for x in readers]  # the second block's, at the middle of the first one
        yield
        products = dot(jnp.concatenate([*(x.astype(dtype) for x in readers), *at_first]), read, (1, 1))
        yield
        own, across = (products[: count * C].reshape(count, 2, PART, C), products[count * C :].reshape(count, PART, C))
        first = [jnp.where(i >= j, x[0], 0) for x in own]
        second = [jnp.where(j < PART, x, jnp.where(i + PART >= j, y[1], 0)) for x, y in zip(across, own, strict=True)]
        return [jnp.concatenate(both) for both in zip(first, second, strict=True)]

    def gradients(self, d_scores: list[jax.Array], rows: list[jax.Array], k: jax.Array, dtype) -> Generator[None, None, Gradients]:
        """As :meth:`.ChannelDecays.gradients`."""
        C = k.shape[0]
        i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
        d_scores = [jnp.where(i >= j, x, 0).astype(dtype) for x in d_scores]
        readers = [(x * self.since).astype(dtype) for x in rows]
        read = k * self.until
        first = read[:PART].astype(dtype)
        at_second = jnp.concatenate([read[:PART] * self.across, read[PART:]]).astype(dtype)  # all, at the middle of the second block
        yield
        d_rows = [jnp.concatenate([dot(x[:PART, :PART], first), dot(x[PART:], at_second)]) * self.since for x in d_scores]
        yield
        pairs = list(zip(d_scores, readers, strict=True))
        d_first = sum(dot(x[:PART, :PART], reader[:PART], (0, 0)) for x, reader in pairs)
        d_second = sum(dot(x[PART:], reader[PART:], (0, 0)) for x, reader in pairs)
        yield
        d_k = jnp.concatenate([d_first + self.across * d_second[:PART], d_second[PART:]]) * self.until
        rounded = [x.astype(jnp.float32) * self.until for x in readers]
        rounded_k = jnp.concatenate([first, at_second[PART:]]).astype(jnp.float32) * self.since
        return Gradients(d_rows, d_k, None, rounded, rounded_k)


def near_decays(log_decay: jax.Array, since_middle: jax.Array, heads: int) -> list[NearDecays]:
    """log_decay [C,heads K] float32 of two blocks, of which :func:`are_near` is true -> the decays of each head.

    since_middle: of :func:`.spans`.
    """
    K = log_decay.shape[1] // heads
    log_decay = log_decay * LOG2E
    blocks = log_decay[:PART], log_decay[PART:]
    x = [sums(since_middle, block) for block in blocks]
    since, until = [jnp.exp2(sum_) for sum_ in x], [jnp.exp2(-sum_) for sum_ in x]
    starts = [jnp.exp2(block[:1] - sum_[:1]) for block, sum_ in zip(blocks, x, strict=True)]
    found = jnp.concatenate(since), jnp.concatenate(until), starts[0], since[0][-1:] * starts[1], since[1][-1:]
    return [NearDecays(*(of[:, n * K : (n + 1) * K] for of in found)) for n in range(heads)]
