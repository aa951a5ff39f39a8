"""Names for what operators keep for their backward passes, by which policies of ``jax.checkpoint`` know what is dear to compute again."""

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"  # the output and its logsumexp: quadratic work, of linear size


def of_attention(output: jax.Array, logsumexp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, named; to be called where ``custom_vjp`` makes residuals of them."""
    return checkpoint_name(output, ATTENTION), checkpoint_name(logsumexp, ATTENTION)
