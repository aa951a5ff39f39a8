"""The heads of a step of the TPU kernels' grid with decays a channel: in one of two ways, as their decays allow."""

from collections.abc import Callable, Generator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_linear_attention.tpu_decays import PART, addends, per_channel, spans
from pallas_kernels.gated_linear_attention.tpu_near import are_near, near_decays
from pallas_kernels.gated_linear_attention.tpu_stages import run, together


def constants(tokens: int, dtype) -> tuple[jax.Array, jax.Array]:
    """What the kernels take for sums of the log decays of a chunk of ``tokens``, and of their gradients."""
    t = np.arange(tokens)
    later, before = t[:, None] <= t, t[:, None] > t
    return spans(dtype), addends(np.concatenate([later, before], axis=1), dtype)


def by_heads(heads: int, log_decay_ref, spans_ref, head: Callable[..., Generator], use: Callable[[list], None] = lambda results: None):
    """Run the generators ``head(its number, its decays)``, the decays of two computed at once, and ``use`` what they return.

    In bfloat16 all of that is there twice, and one of them is run: where the decays of all heads are near, and else. The test reads what
    is in VMEM anyway. In float32 sums since the middle would lose some bits.
    """
    side, K = (2 if heads % 2 == 0 else 1), log_decay_ref.shape[2] // heads

    def pair(h, near):
        log_decay = log_decay_ref[0, :, h * K : (h + side) * K]
        if near:
            decays = near_decays(log_decay, spans_ref[4 * PART :], side)
        else:
            decays = per_channel(log_decay, spans_ref[: 4 * PART], side)
        yield
        return (yield from together(head(h + n, decays[n]) for n in range(side)))

    def all_heads(near):
        use([result for results in run(pair(h, near) for h in range(0, heads, side)) for result in results])

    if spans_ref.dtype == jnp.bfloat16:
        jax.lax.cond(are_near(log_decay_ref[0]), lambda: all_heads(True), lambda: all_heads(False))
    else:
        all_heads(False)
