"""The public face of the gated delta rule: arguments checked, implementation chosen."""
import jax
import jax.numpy as jnp

from pallas_kernels import checks, platforms, segments
from pallas_kernels.gated_delta_rule import associative_scan, gpu, reference, tpu, xla


def _kernel(*arguments):
    return platforms.kernels(tpu, gpu).gated_delta_rule(*arguments)


IMPLEMENTATIONS = {
    "reference": reference.gated_delta_rule,
    "xla": xla.gated_delta_rule,
    "associative_scan": associative_scan.gated_delta_rule,
    "pallas": _kernel,
}


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The delta rule with a decaying state, a document at a time:

        S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

    DeltaNet (g = 0), Gated DeltaNet (g per head and step), Kimi Delta Attention (g per channel).

    q, k: [B,T,H,K] floating point, any B. The caller normalises k; where |k| is not 1 the equation holds as it stands, and S_t is bounded
        as long as beta_t |k_t|^2 <= 2.
    v: [B,T,HV,V] with HV a multiple of H: value head j reads the query and key head j // (HV / H).
    beta: [B,T,HV].
    log_decay: finite g <= 0, [B,T,HV,K], [B,T,HV], [HV], or None for no decay. None and one a head cost less than one a channel.
    scale: K**-0.5 where None.
    initial_state: [B,HV,K,V], of the document of the first real token; zeros where None.
    segment_ids: [B,T] int; the state starts at zero wherever the id changes. 0 marks padding, whatever it holds: it changes no state
        and its output is 0.
    implementation: "reference" (token by token), "xla" (a scan over chunks), "associative_scan" (chunks combined in log2(T) steps) or
        "pallas" (a TPU kernel, interpreted on CPU; float32 and bfloat16. Traced for a Hopper GPU, one for it: q, k and v in bfloat16,
        K of 64, 128 or, but for decays a channel, 256, V a multiple of 64). None takes the fastest for the platform that the program is
        lowered for: "pallas" on TPU and Hopper where it can, else "xla".

    Returns (output [B,T,HV,V] in v's dtype, final_state [B,HV,K,V] after the last real token): states, gates and sums are in float32,
    in float64 where an argument is. Products of float32 arrays follow ``jax.default_matmul_precision``; those that decide about
    exactness (sums of decays, triangular inverses) are always in full precision.
    Differentiable in every floating-point argument.
    Raises ValueError for what is no array, shapes and head counts that disagree, dtypes that are not floating point (segment_ids:
    integer), T = 0 and an unknown implementation.
    """
    name = "gated_delta_rule"
    sizes = _check(name, "B T", q, k, v, beta, log_decay, initial_state, "initial_state")
    checks.bind_shapes(name, {"segment_ids": (segment_ids, "B T")}, B=sizes["B"], T=sizes["T"])
    checks.check_segment_ids(name, segment_ids)
    checks.check_tokens(name, q=q)
    kernel = "pallas" if platforms.kernels(tpu, gpu).is_faster(q, k, v, beta, log_decay) else None
    run = checks.choose(name, IMPLEMENTATIONS, implementation, default="xla", kernel=kernel)

    dtype = _state_dtype(q, k, v, beta, log_decay, initial_state)
    # Arrays made from others with zeros_like vary over the same axes of a mesh, as a loop's carry has to inside shard_map.
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay + jnp.zeros_like(beta, dtype=log_decay.dtype)
    state = jnp.zeros_like(v, shape=tuple(sizes[letter] for letter in ("B", "HV", "K", "V")), dtype=dtype)
    if initial_state is not None:
        state = state + initial_state
    if sizes["B"] == 0:  # which no chunks are dealt out over
        return jnp.zeros_like(v), state
    numbered = None if segment_ids is None else segments.number(segment_ids)
    return run(q, k, v, beta, log_decay, state, numbered, _scale(scale, q))


def gated_delta_rule_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of :func:`gated_delta_rule`, for decoding.

    q, k: [B,H,K]; v: [B,HV,V]; beta: [B,HV]; log_decay: None, [HV], [B,HV] or [B,HV,K]; state: [B,HV,K,V].
    Returns (output [B,HV,V] in v's dtype, the next state [B,HV,K,V] in float32, or float64 where an argument is).
    Raises ValueError for shapes and head counts that disagree and dtypes that are not floating point.
    """
    _check("gated_delta_rule_step", "B", q, k, v, beta, log_decay, state, "state")
    dtype = _state_dtype(q, k, v, beta, log_decay, state)
    groups = v.shape[1] // q.shape[1]
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, beta.shape + log_decay.shape[2:]).astype(dtype)
    q, k, v_, beta, state = (x.astype(dtype) for x in (q, k, v, beta, state))
    q, k = jnp.repeat(_scale(scale, q) * q, groups, axis=1), jnp.repeat(k, groups, axis=1)
    output, state = reference.update(q, k, v_, beta, log_decay, state)
    return output.astype(v.dtype), state


def _state_dtype(*arrays: jax.Array | None):
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays if x is not None))


def _scale(scale: float | None, q: jax.Array) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(operator: str, lead: str, q, k, v, beta, log_decay, state, state_name: str) -> dict[str, int]:
    """Sizes by letter; ``lead`` names the axes in front of the heads."""
    checks.check_floating(operator, q=q, k=k, v=v, beta=beta, log_decay=log_decay, **{state_name: state})
    decay_axes = ["HV", f"{lead} HV", f"{lead} HV K"]
    arguments = {
        "q": (q, f"{lead} H K"),
        "k": (k, f"{lead} H K"),
        "v": (v, f"{lead} HV V"),
        "beta": (beta, f"{lead} HV"),
        state_name: (state, "B HV K V"),
    }
    if log_decay is not None:
        axes = {len(axes.split()): axes for axes in decay_axes}
        if log_decay.ndim not in axes:
            choices = " or ".join(f"[{axes.replace(' ', ',')}]" for axes in decay_axes)
            raise ValueError(f"{operator}: log_decay has shape {log_decay.shape}, needs {choices}, or None")
        arguments["log_decay"] = (log_decay, axes[log_decay.ndim])
    sizes = checks.bind_shapes(operator, arguments)
    if sizes["HV"] % sizes["H"]:
        raise ValueError(f"{operator}: v has {sizes['HV']} heads, needs a multiple of the {sizes['H']} heads of q and k")
    return sizes
