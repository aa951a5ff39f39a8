"""The public face of attention: arguments checked, implementation chosen."""
import jax
import jax.numpy as jnp

from pallas_kernels import checks, segments
from pallas_kernels.attention import reference, tpu, xla

IMPLEMENTATIONS = {"reference": reference.attention, "xla": xla.attention, "pallas": tpu.attention}


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

    q: [B,T,H,K], k: [B,T,HK,K], v: [B,T,HK,V], floating point; HK divides H and query head h reads head h // (H / HK) of k and v.
    scale: K**-0.5 where None.
    window: a token sees itself and the window - 1 before it (i - j < window); None for no limit.
    segment_ids: [B,T] int; a token attends within its own document. 0 marks padding, which is skipped: its output is 0, nothing
        attends to it whatever it holds, and windows do not count it.
    implementation: "reference" (the whole [T,T] matrix, float32), "xla" (blockwise, memory linear in T), "pallas" (Splash Attention
        on TPU, interpreted on CPU; float32 and bfloat16), or None for that of the platform that the program is lowered for:
        "pallas" on TPU, elsewhere "xla", at every length the fastest measured (on CPU, T = 96 to 2048, forward and backward).

    Returns the output [B,T,H,V] in v's dtype. Scores, softmax and sums are float32 (float64 for float64 inputs); "xla" multiplies
    operands in their own dtype, at jax's default matmul precision. Differentiable in q, k and v.
    Raises ValueError for shapes that disagree, heads that do not divide, dtypes that are not floating point (segment_ids:
    integer), a window below 1 and an unknown implementation.
    """
    sizes = checks.bind_shapes(
        "attention",
        {"q": (q, "B T H K"), "k": (k, "B T HK K"), "v": (v, "B T HK V"), "segment_ids": (segment_ids, "B T")},
    )
    _check("attention", sizes, window, q=q, k=k, v=v)
    checks.check_segment_ids("attention", segment_ids)
    on_tpu = "pallas" if tpu.is_faster(q, k, v) else None
    run = checks.choose("attention", IMPLEMENTATIONS, implementation, default="xla", on_tpu=on_tpu)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    return run(q, k, v, scale, window, None if segment_ids is None else segments.number(segment_ids)).astype(v.dtype)


def attention_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    length: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """:func:`attention` of a chunk of tokens that go on from cached ones, which it attends to as well.

    q, k, v, scale, window, segment_ids: as in :func:`attention`. The cached tokens belong to the document of the first real token.
    k_cache: [B,S,HK,K], v_cache: [B,S,HK,V], floating point, finite: a ring, in which slot t % S holds token t of its row, or what
        follows it S later. Nothing is written to it.
    length: [B] integers, how many tokens each row has had. Those beyond the last S are gone: give window <= S, or let length <= S.

    Returns the output [B,T,H,V] in v's dtype. Blockwise over the cache, as far as it is filled: scratch memory does not grow with S.
    Raises ValueError for shapes that disagree, heads that do not divide, wrong dtypes and a window below 1.
    """
    sizes = _check_cached("attention_prefill", "B T", q, k, v, k_cache, v_cache, length, window)
    checks.bind_shapes("attention_prefill", {"segment_ids": (segment_ids, "B T")}, B=sizes["B"], T=sizes["T"])
    checks.check_segment_ids("attention_prefill", segment_ids)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    numbered = None if segment_ids is None else segments.number(segment_ids)
    return xla.attention_prefill(q, k, v, k_cache, v_cache, length, scale, window, numbered).astype(v.dtype)


def attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    length: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """One token of :func:`attention`, for decoding: it attends to the cached tokens of its row and to itself.

    q: [B,H,K]; k: [B,HK,K]; v: [B,HK,V]; k_cache, v_cache, length, scale, window: as in :func:`attention_prefill`.
    Returns the output [B,H,V] in v's dtype. The cache then takes k and v in slot length % S, which is the caller's to do: for all
    layers in one go, or in place.
    Raises ValueError for shapes that disagree, heads that do not divide, wrong dtypes and a window below 1.
    """
    sizes = _check_cached("attention_step", "B", q, k, v, k_cache, v_cache, length, window)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    q, k, v = q[:, None], k[:, None], v[:, None]
    return reference.attention_prefill(q, k, v, k_cache, v_cache, length, scale, window, None)[:, 0].astype(v.dtype)


def _check_cached(operator: str, lead: str, q, k, v, k_cache, v_cache, length, window) -> dict[str, int]:
    """Sizes by letter; ``lead`` names the axes in front of the heads."""
    sizes = checks.bind_shapes(
        operator,
        {
            "q": (q, f"{lead} H K"),
            "k": (k, f"{lead} HK K"),
            "v": (v, f"{lead} HK V"),
            "k_cache": (k_cache, "B S HK K"),
            "v_cache": (v_cache, "B S HK V"),
            "length": (length, "B"),
        },
    )
    _check(operator, sizes, window, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    if not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"{operator}: length has dtype {length.dtype}, needs integers")
    return sizes


def _check(operator: str, sizes: dict[str, int], window: int | None, **arrays: jax.Array) -> None:
    checks.check_floating(operator, **arrays)
    if sizes["H"] % sizes["HK"]:
        raise ValueError(f"{operator}: q has {sizes['H']} heads, needs a multiple of the {sizes['HK']} of k and v")
    if window is not None and window < 1:
        raise ValueError(f"{operator}: window is {window}, needs to be at least 1 (the token itself) or None")
