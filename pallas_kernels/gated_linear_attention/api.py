"""The public face of linear attention with decay: fixed per head, per head and step, or per channel and step."""
import jax
import jax.numpy as jnp

from pallas_kernels import checks, platforms, segments
from pallas_kernels.gated_linear_attention import associative_scan, gpu, reference, tpu, xla


def _kernel(*arguments):
    return platforms.kernels(tpu, gpu).gated_linear_attention(*arguments)


IMPLEMENTATIONS = {
    "reference": reference.gated_linear_attention,
    "xla": xla.gated_linear_attention,
    "associative_scan": associative_scan.gated_linear_attention,
    "pallas": _kernel,
}


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gated linear attention (Yang et al. 2024, eq. 3), a token reading the state that it has just written:

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    q, k: [B,T,H,K], any B, any T >= 1.
    v: [B,T,HV,V] with HV = n H heads; v head j reads q and k head j // n.
    log_decay: <= 0, down to -inf, which forgets; [HV] fixed per head (RetNet), [B,T,HV] per head and step (Mamba-2, simple GLA) or
        [B,T,HV,K] per channel (GLA, HGRN2). The fewer its axes, the cheaper.
    scale: K**-0.5 where None.
    initial_state: [B,HV,K,V], S before the first real token; zeros where None.
    segment_ids: [B,T] integers. The state starts at zero where the id changes; 0 marks padding, which changes no state and
        whose output is 0. ``initial_state`` belongs to the first real token's segment, the final state to the last one's.
    implementation: "reference" (token by token), "xla" (chunked, a loop over chunks), "associative_scan" (all chunks at once) or
        "pallas" (a TPU kernel, interpreted on CPU; float32 and bfloat16; in a program traced for a Hopper GPU, a kernel for that:
        bfloat16, K and V multiples of 64). None takes the fastest for the platform that the program is lowered
        for: "pallas" on TPU and Hopper where it can, else "xla".

    Returns (o [B,T,HV,V] in v's dtype, final_state [B,HV,K,V] in float32). Decays, sums and states are float32, or float64
    where an input is float64; matrix products follow ``jax.default_matmul_precision``. Exact for any decay: no quotient of
    decays is formed that could overflow or vanish. Differentiable in every float argument. Raises ValueError for shapes, dtypes or names
    that do not fit.
    """
    operator = "gated_linear_attention"
    checks.check_floating(operator, q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)
    axes = _decay_axes(operator, log_decay, {4: "B T HV K", 3: "B T HV", 1: "HV"})
    sizes = checks.bind_shapes(
        operator,
        {
            "q": (q, "B T H K"),
            "k": (k, "B T H K"),
            "v": (v, "B T HV V"),
            "log_decay": (log_decay, axes),
            "initial_state": (initial_state, "B HV K V"),
            "segment_ids": (segment_ids, "B T"),
        },
    )
    checks.check_tokens(operator, q=q)
    _check_heads(operator, sizes)
    checks.check_segment_ids(operator, segment_ids)
    kernel = "pallas" if platforms.kernels(tpu, gpu).is_faster(q, k, v, log_decay) else None
    run = checks.choose(operator, IMPLEMENTATIONS, implementation, default="xla", kernel=kernel)

    if initial_state is None:
        # Zeros like an outer product of k and v, so that inside shard_map they vary over the same axes of the mesh.
        initial_state = jnp.zeros_like(k[:, 0, :1, :, None] * v[:, 0, :, None, :])
    initial_state = initial_state.astype(_state_dtype(q, k, v, log_decay))
    if sizes["B"] == 0:  # which no chunks are dealt out over
        return jnp.zeros_like(v), initial_state
    numbered = None if segment_ids is None else segments.number(segment_ids)
    return run(q, k, v, log_decay, initial_state, numbered, sizes["K"] ** -0.5 if scale is None else scale)


def gated_linear_attention_step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array, *, scale: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of :func:`gated_linear_attention`, for decoding.

    q, k: [B,H,K]; v: [B,HV,V]; log_decay: [HV], [B,HV] or [B,HV,K]; state: [B,HV,K,V].
    Returns (o [B,HV,V] in v's dtype, the new state in float32 or wider).
    """
    operator = "gated_linear_attention_step"
    axes = _decay_axes(operator, log_decay, {3: "B HV K", 2: "B HV", 1: "HV"})
    sizes = checks.bind_shapes(
        operator,
        {"q": (q, "B H K"), "k": (k, "B H K"), "v": (v, "B HV V"), "log_decay": (log_decay, axes), "state": (state, "B HV K V")},
    )
    _check_heads(operator, sizes)
    checks.check_floating(operator, q=q, k=k, v=v, log_decay=log_decay, state=state)
    state = state.astype(_state_dtype(q, k, v, log_decay))
    o, state = reference.step(q, k, v, log_decay, state)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    return (scale * o).astype(v.dtype), state


def _decay_axes(operator, log_decay, by_rank):
    if log_decay.ndim not in by_rank:
        wanted = " or ".join(f"[{axes.replace(' ', ',')}]" for axes in by_rank.values())
        raise ValueError(f"{operator}: log_decay has shape {log_decay.shape}, needs {wanted}")
    return by_rank[log_decay.ndim]


def _check_heads(operator, sizes):
    if sizes["HV"] % sizes["H"]:
        raise ValueError(f"{operator}: v has {sizes['HV']} heads, needs a multiple of the {sizes['H']} heads of q and k")


def _state_dtype(*arrays):
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))
