"""Names for what an operator keeps for its backward pass, by which policies of ``jax.checkpoint`` tell it from what is cheap to compute again."""

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"  # the output and its logsumexp: quadratic work, of linear size


def of_attention(output: jax.Array, logsumexp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, named; to be called where ``custom_vjp`` makes residuals of them."""
    return checkpoint_name(output, ATTENTION), checkpoint_name(logsumexp, ATTENTION)
