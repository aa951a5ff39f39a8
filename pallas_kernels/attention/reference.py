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


def attention_prefill(q, k_cache, v_cache, length, scale, window, segments: Segments | None):
    """A chunk against a cache that holds it, by the whole matrix of scores; see api.py."""
    B, T, H, K = q.shape
    HK, S = k_cache.shape[1:3]
    place = query_places(length, segments, B, T)
    distance = place[:, :, None] - cached_places(length, S)[:, None, :]  # [B,T,S]; to a slot never written more than any place
    allowed = (place[:, :, None] >= 0) & (distance >= 0) & (distance <= place[:, :, None])
    if window is not None:
        allowed &= distance < window
    allowed = allowed[:, None, None]

    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, HK, H // HK, K)
    scores = scale * jnp.einsum("bthgk,bhsk->bhgts", q, k_cache.astype(q.dtype), preferred_element_type=dtype)
    scores = jnp.where(allowed, scores, MASKED)
    weights = jnp.where(allowed, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    output = jnp.einsum("bhgts,bhsv->bhgtv", weights.astype(v_cache.dtype), v_cache, preferred_element_type=dtype)
    return jnp.moveaxis(output, 3, 1).reshape(B, T, H, -1)


def query_places(length, segments: Segments | None, B: int, T: int):
    """[B,T] int32: which token of its row each query is, -1 at padding; the last real one is token length - 1."""
    real = jnp.ones((B, T), bool) if segments is None else segments.real
    before = length - jnp.sum(real, axis=1)
    return jnp.where(real, before[:, None] + jnp.cumsum(real, axis=1) - 1, -1)


def cached_places(length, slots: int):
    """[B,S] int32: which token of its row each slot of a cache holds, the last that was put there; negative where none was."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots
