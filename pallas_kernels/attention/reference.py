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


def attention_prefill(q, k, v, k_cache, v_cache, length, scale, window, segments: Segments | None):
    """A chunk against the cache and itself, by the whole matrix of scores; see api.py."""
    B, T, H, K = q.shape
    S, HK = k_cache.shape[1:3]
    index, real = one_segment(B, T) if segments is None else segments
    q, k, v = (jnp.where(real[:, :, None, None], a, 0) for a in (q, k, v))
    place = jnp.where(real, length[:, None] + jnp.cumsum(real, axis=1) - 1, -1)  # of each token in its row; [B,T]
    keys = jnp.concatenate([cached_places(length, S), place], axis=1)
    document = jnp.concatenate([jnp.zeros((B, S), index.dtype), index], axis=1)
    distance = place[:, :, None] - keys[:, None, :]  # [B,T,S+T]
    allowed = (keys[:, None, :] >= 0) & (distance >= 0) & (document[:, None, :] == index[:, :, None])
    if window is not None:
        allowed &= distance < window
    allowed = allowed[:, None, None]

    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, HK, H // HK, K)
    # The cache is never copied: what is joined are the scores.
    scores = [jnp.einsum("bthgk,bshk->bhgts", q, a.astype(q.dtype), preferred_element_type=dtype) for a in (k_cache, k)]
    scores = jnp.where(allowed, scale * jnp.concatenate(scores, axis=-1), MASKED)
    weights = jnp.where(allowed, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    cached, own = jnp.split(weights.astype(v.dtype), [S], axis=-1)
    values = zip((cached, own), (v_cache.astype(v.dtype), v), strict=True)
    output = sum(jnp.einsum("bhgts,bshv->bthgv", w, a, preferred_element_type=dtype) for w, a in values)
    return output.reshape(B, T, H, -1)


def cached_places(length, slots: int):
    """[B,S] int32: which token of its row each slot of a cache holds, the last that was put there; negative where none was."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots
