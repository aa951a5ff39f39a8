"""Attention by the whole [T,T] matrix of scores: the definition, and the decoding step."""
import jax.numpy as jnp

from pallas_kernels.segments import Segments, one_segment

MASKED = -1e30  # finite, so that a row with nothing to attend to subtracts no infinities


def attention(q, k, v, scale, window, segments: Segments | None):
    """softmax(scale * q k^T, over the allowed keys) v, in float32; see api.py."""
    B, T, H, K = q.shape
    HK = k.shape[2]
    segments = one_segment(B, T) if segments is None else segments
    index, real = segments
    rank = jnp.cumsum(real, axis=1)  # distances are counted in real tokens
    distance = rank[:, :, None] - rank[:, None, :]  # [B,T,S]
    allowed = (index[:, :, None] == index[:, None, :]) & real[:, :, None] & real[:, None, :] & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    allowed = allowed[:, None, None]

    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (jnp.where(real[:, :, None, None], a, 0).astype(dtype) for a in (q, k, v))
    q = q.reshape(B, T, HK, H // HK, K)
    scores = scale * jnp.einsum("bthgk,bshk->bhgts", q, k, precision="highest")
    scores = jnp.where(allowed, scores, MASKED)
    weights = jnp.where(allowed, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return jnp.einsum("bhgts,bshv->bthgv", weights, v, precision="highest").reshape(B, T, H, -1)


def attention_step(q, k_cache, v_cache, length, scale, window):
    """One query a row against the first ``length`` entries of its cache; see api.py."""
    B, H, K = q.shape
    S, HK = k_cache.shape[1:3]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    at = jnp.arange(S)
    allowed = at < length[:, None]  # [B,S]
    if window is not None:
        allowed &= length[:, None] - 1 - at < window
    q = q.reshape(B, HK, H // HK, K)
    scores = scale * jnp.einsum("bhgk,bshk->bhgs", q, k_cache, preferred_element_type=dtype)
    scores = jnp.where(allowed[:, None, None], scores, MASKED)
    weights = jnp.where(allowed[:, None, None], jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    v_cache = jnp.where(allowed[:, :, None, None], v_cache, 0)
    return jnp.einsum("bhgs,bshv->bhgv", weights.astype(v_cache.dtype), v_cache, preferred_element_type=dtype).reshape(B, H, -1)
