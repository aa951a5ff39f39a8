"""The public face of attention: arguments checked, implementation chosen."""
import jax
import jax.numpy as jnp

from pallas_kernels import checks, platforms, segments
from pallas_kernels.attention import gpu, reference, tpu, xla


def _kernel(*arguments):
    return platforms.kernels(tpu, gpu).attention(*arguments)


IMPLEMENTATIONS = {"reference": reference.attention, "xla": xla.attention, "pallas": _kernel}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal softmax attention: o_i = sum_j softmax_j(scale * q_i . k_j) v_j over the j <= i of i's document.

    q: [B,T,H,K], k: [B,T,HK,K], v: [B,T,HK,V], floating point, any B, any T >= 1; HK divides H and query head h reads head h // (H / HK)
        of k and v.
    scale: K**-0.5 where None.
    window: a token sees itself and the window - 1 before it (i - j < window); None for no limit.
    segment_ids: [B,T] int; a token attends within its own document. 0 marks padding, which is skipped: its output is 0, nothing
        attends to it whatever it holds, and windows do not count it.
    implementation: "reference" (the whole [T,T] matrix, float32), "xla" (blockwise, memory linear in T), "pallas" (Splash Attention
        on TPU, interpreted on CPU, float32 and bfloat16; on Hopper GPUs cuDNN's, or where there are segment_ids Mosaic kernels,
        bfloat16 and heads of 128 at most), or None for that of the platform that the program is lowered for: "pallas" on TPU and
        on Hopper where it takes the arrays, elsewhere "xla", on CPU at every length the fastest measured (T = 96 to 2048).

    Returns the output [B,T,H,V] in v's dtype. Scores, softmax and sums are float32 (float64 for float64 inputs); "xla" multiplies
    operands in their own dtype, at jax's default matmul precision. Differentiable in q, k and v.
    Raises ValueError for shapes that disagree, heads that do not divide, dtypes that are not floating point (segment_ids:
    integer), T = 0, a window below 1 and an unknown implementation.
    """
    sizes = check(q, k, v, window, segment_ids)
    kernel = "pallas" if platforms.kernels(tpu, gpu).is_faster(q, k, v) else None
    run = checks.choose("attention", IMPLEMENTATIONS, implementation, default="xla", kernel=kernel)
    if sizes["B"] == 0:  # which no blocks are dealt out over
        return jnp.zeros_like(v, shape=(*q.shape[:3], sizes["V"]))
    scale = sizes["K"] ** -0.5 if scale is None else scale
    return run(q, k, v, scale, window, None if segment_ids is None else segments.number(segment_ids)).astype(v.dtype)


def check(q, k, v, window: int | None, segment_ids: jax.Array | None) -> dict[str, int]:
    """The sizes of :func:`attention`'s arguments by letter. Raises its ValueErrors."""
    sizes = checks.bind_shapes(
        "attention",
        {"q": (q, "B T H K"), "k": (k, "B T HK K"), "v": (v, "B T HK V"), "segment_ids": (segment_ids, "B T")},
    )
    _check("attention", sizes, window, q=q, k=k, v=v)
    checks.check_segment_ids("attention", segment_ids)
    checks.check_tokens("attention", q=q)
    return sizes


def attention_prefill(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    length: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """:func:`attention` of a chunk of tokens against a cache of keys and values, which holds theirs already, after those before them.

    q: [B,T,H,K] floating point.
    k_cache: [B,HK,S,K], v_cache: [B,HK,S,V], floating point, finite: rings, in which slot t % S holds token t of its row, or what
        came S later; other slots are ignored. HK divides H.
    length: [B] integers, the tokens of each row so far; its last real query is token length - 1. Only the last S of them are there:
        let length <= S, or window + T - 1 <= S.
    scale, window: as in :func:`attention`.
    segment_ids: [B,T] int; 0 marks padding, which is skipped: its output is 0. All else is one document, that of the cache.

    Returns the output [B,T,H,V] in v_cache's dtype. Blockwise over the cache, as far as it is filled: scratch memory does not grow
    with S. Not differentiable.
    Raises ValueError for shapes that disagree, heads that do not divide, wrong dtypes and a window below 1.
    """
    sizes = _check_cached("attention_prefill", q, "B T H K", k_cache, v_cache, length, window)
    checks.bind_shapes("attention_prefill", {"segment_ids": (segment_ids, "B T")}, B=sizes["B"], T=sizes["T"])
    checks.check_segment_ids("attention_prefill", segment_ids)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    numbered = None if segment_ids is None else segments.number(segment_ids)
    return xla.attention_prefill(q, k_cache, v_cache, length, scale, window, numbered).astype(v_cache.dtype)


def attention_step(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    length: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """One token of :func:`attention`, for decoding; its own key and value are in the cache already, as token length - 1.

    q: [B,H,K]; k_cache, v_cache, length, scale, window: as in :func:`attention_prefill`. A row of length 0 has the output 0.
    Returns the output [B,H,V] in v_cache's dtype.
    Raises ValueError for shapes that disagree, heads that do not divide, wrong dtypes and a window below 1.
    """
    sizes = _check_cached("attention_step", q, "B H K", k_cache, v_cache, length, window)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    return reference.attention_prefill(q[:, None], k_cache, v_cache, length, scale, window, None)[:, 0].astype(v_cache.dtype)


def _check_cached(operator: str, q, axes: str, k_cache, v_cache, length, window) -> dict[str, int]:
    arguments = {"q": (q, axes), "k_cache": (k_cache, "B HK S K"), "v_cache": (v_cache, "B HK S V"), "length": (length, "B")}
    sizes = checks.bind_shapes(operator, arguments)
    _check(operator, sizes, window, q=q, k_cache=k_cache, v_cache=v_cache)
    if not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"{operator}: length has dtype {length.dtype}, needs integers")
    return sizes


def _check(operator: str, sizes: dict[str, int], window: int | None, **arrays: jax.Array) -> None:
    checks.check_floating(operator, **arrays)
    if sizes["H"] % sizes["HK"]:
        raise ValueError(f"{operator}: q has {sizes['H']} heads, needs a multiple of the {sizes['HK']} of k and v")
    if window is not None and window < 1:
        raise ValueError(f"{operator}: window is {window}, needs to be at least 1 (the token itself) or None")
