"""Cross-entropy straight from hidden states, without the logits of a whole batch.

For a token with hidden state h, output kernel W and target y:

    loss = logsumexp(h W) - (h W)_y            d(h W) = softmax(h W) - onehot(y)

At 32 000 tokens of vocabulary the float32 logits of a batch outweigh everything else in a training step. So the window is
cut into blocks; a scan makes a block's logits, its losses and, when gradients are wanted, at once its share of dh and dW.
The backward pass is then a multiplication by a scalar: three matmuls of that size in all, none of them done twice.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from hybrid_jax.sharding import RULES, constrain

BATCH_AXES, TIME_AXIS, VOCABULARY_AXIS = (RULES[axis] for axis in ("batch", "time", "vocabulary"))  # of the mesh, where there is one


class Losses(NamedTuple):
    """Sums over a batch. Only ``total`` is differentiable."""

    total: jax.Array  # [] float32, sum of weight * loss in nats
    weight: jax.Array  # [] float32, sum of weights
    total_by_position: jax.Array  # [T] float32, the same two sums over B alone
    weight_by_position: jax.Array  # [T] float32
    correct: jax.Array  # [] float32, sum of the weights of tokens whose target has the highest logit, alone


def batch_losses(model, batch: dict[str, jax.Array]) -> Losses:
    """Those of a model on the pipeline's arrays: tokens, targets, weights and, where rows hold more than one segment, segment_ids."""
    hidden = model.hidden(batch["tokens"], batch.get("segment_ids"))
    return cross_entropy(hidden, model.output_kernel(), batch["targets"], batch["weights"])


def cross_entropy(hidden, kernel, targets, weights, *, block: int = 512) -> Losses:
    """Next-token losses of hidden states under an output kernel.

    hidden [B,T,D] in the compute dtype, kernel [D,V], targets [B,T] int in [0, V), weights [B,T] float (0: not counted).
    Matmuls run in hidden's dtype with float32 accumulation, everything after them in float32; at most ``block`` positions
    of the window have logits at one time. Under a mesh (``jax.set_mesh``) each device works on its own rows, positions
    and part of the vocabulary. Differentiable in hidden, kernel and weights.
    """
    total, losses, correct = _total(hidden, kernel, targets, weights.astype(jnp.float32), block)
    losses = lax.stop_gradient(losses)
    return Losses(total, weights.sum(), (weights * losses).sum(0), weights.sum(0), (weights * correct).sum())


def token_losses(hidden, kernel, targets, *, block: int = 512):
    """(the loss of every token, 1 where its target has the highest logit, alone), both [B,T] float32; as :func:`cross_entropy`,
    without gradients."""
    weights = jnp.zeros(targets.shape, jnp.float32)
    (_, losses, correct), _ = _on_mesh(hidden, kernel, targets, weights, block, gradients=False)
    return losses, correct


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _total(hidden, kernel, targets, weights, block):
    outputs, _ = _on_mesh(hidden, kernel, targets, weights, block, gradients=False)
    return outputs


def _total_forward(hidden, kernel, targets, weights, block):
    outputs, gradients = _on_mesh(hidden, kernel, targets, weights, block, gradients=True)
    return outputs, (*gradients, outputs[1])


def _total_backward(block, residuals, cotangents):
    d_hidden, d_kernel, d_weights = residuals
    g = cotangents[0]
    return (g * d_hidden).astype(d_hidden.dtype), g * d_kernel, None, g * d_weights


_total.defvjp(_total_forward, _total_backward)


def _on_mesh(hidden, kernel, targets, weights, block, gradients):
    """``_local`` on the whole batch, or through shard_map on each device's part of it.

    Left to the partitioner, the kernel's gradient would be summed over the devices at every block instead of once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local(hidden, kernel, targets, weights, block, gradients, (), None)
    rows = P(BATCH_AXES, TIME_AXIS)
    parts = mesh.shape[VOCABULARY_AXIS]
    vocabulary = VOCABULARY_AXIS if parts > 1 and kernel.shape[1] % parts == 0 else None
    local = partial(_local, block=block, gradients=gradients, token_axes=(*BATCH_AXES, TIME_AXIS), vocabulary_axis=vocabulary)
    gradient_specs = (rows, P(None, vocabulary)) if gradients else None
    kernel = constrain(kernel.astype(hidden.dtype), "embed", vocabulary and "vocabulary")  # so that devices send it in the compute dtype
    return jax.shard_map(
        local,
        in_specs=(rows, P(None, vocabulary), rows, rows),
        out_specs=((P(), rows, rows), gradient_specs),
        check_vma=False,
    )(hidden, kernel, targets, weights)


def _local(hidden, kernel, targets, weights, block, gradients, token_axes, vocabulary_axis):
    """((total, losses [B,T], correct [B,T]), (d_hidden [B,T,D], d_kernel [D,V] float32) or None), block by block."""
    T = hidden.shape[1]
    N = -(-T // block)
    C = -(-T // N)

    def split(x):  # [B,T,...] -> [N,B,C,...]
        x = jnp.pad(x, [(0, 0), (0, N * C - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], N, C, *x.shape[2:]), 1, 0)

    def join(x):  # back again
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], N * C, *x.shape[3:])[:, :T]

    body = partial(_block, kernel=kernel.astype(hidden.dtype), gradients=gradients, vocabulary_axis=vocabulary_axis)
    carry = jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32) if gradients else None
    (total, d_kernel), blocks = lax.scan(body, carry, jax.tree.map(split, (hidden, targets, weights)))
    losses, correct, d_hidden = jax.tree.map(join, blocks)
    # XLA for CPU folds a tied embedding's transpose into the product of a lone block, in a form that its bfloat16 dot has not
    d_kernel = lax.optimization_barrier(d_kernel)
    if token_axes:
        total = lax.psum(total, token_axes)
    if not gradients:
        return (total, losses, correct), None
    if token_axes:
        d_kernel = lax.psum(d_kernel, token_axes)
    if vocabulary_axis:
        d_hidden = lax.psum(d_hidden, vocabulary_axis)
    return (total, losses, correct), (d_hidden.astype(hidden.dtype), d_kernel)


def _block(carry, block, *, kernel, gradients, vocabulary_axis):
    """One block of tokens: hidden [B,C,D], targets and weights [B,C], against kernel [D,V] or this device's part of it."""
    total, d_kernel = carry
    hidden, targets, weights = block
    logits = jnp.einsum("bcd,dv->bcv", hidden, kernel, preferred_element_type=jnp.float32)
    first = lax.axis_index(vocabulary_axis) * kernel.shape[1] if vocabulary_axis else 0
    is_target = jnp.arange(kernel.shape[1]) + first == targets[..., None]  # a comparison, not a gather: it fuses, and shards over V

    maximum = _reduce(lax.pmax, logits.max(-1), vocabulary_axis)
    exponentials = jnp.exp(logits - maximum[..., None])
    normalizer = _reduce(lax.psum, exponentials.sum(-1), vocabulary_axis)
    target_logit = _reduce(lax.psum, jnp.where(is_target, logits, 0).sum(-1), vocabulary_axis)
    losses = maximum + jnp.log(normalizer) - target_logit
    others = _reduce(lax.pmax, jnp.where(is_target, -jnp.inf, logits).max(-1), vocabulary_axis)
    correct = (target_logit > others).astype(jnp.float32)
    total += (weights * losses).sum()
    if not gradients:
        return (total, None), (losses, correct, None)

    d_logits = ((exponentials / normalizer[..., None] - is_target) * weights[..., None]).astype(hidden.dtype)
    d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, kernel, preferred_element_type=jnp.float32)
    d_kernel += jnp.einsum("bcd,bcv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return (total, d_kernel), (losses, correct, d_hidden if vocabulary_axis else d_hidden.astype(hidden.dtype))


def _reduce(collective, x, axis):
    return collective(x, axis) if axis else x
