"""The public face of the short convolution: arguments checked, implementation chosen."""
import jax
import jax.numpy as jnp

from pallas_kernels import checks, platforms, segments
from pallas_kernels.causal_conv import gpu, reference, tpu, xla


def _kernel(x, weight, activation, initial_state, segments):
    return platforms.kernels(tpu, gpu).causal_conv(x, weight, activation, initial_state, segments)


# Each of whole rows: (x, weight, activation, initial_state, segments) -> (y, final_state).
IMPLEMENTATIONS = {"reference": reference.causal_conv, "xla": xla.causal_conv, "pallas": _kernel}
ACTIVATIONS = (None, "silu")


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    *,
    activation: str | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution: y_t = act(sum_w weight[:, w] * x_{t-W+1+w}), a document at a time.

    x: [B,T,D] floating point, any B, any T >= 1.
    weight: [D,W] floating point; the last tap multiplies the token itself (the layout of a causal Conv1d with D groups).
    activation: None or "silu".
    initial_state: [B,W-1,D] floating point, the inputs before the first token, oldest first; zeros where None. It belongs to
        the document of the first real token.
    segment_ids: [B,T] int; a tap never reaches another document, beyond whose start it reads zeros. 0 marks padding, which is
        skipped: its output is 0, whatever it holds, and a tap that meets it goes on to the real token before.
    implementation: "reference" (token by token), "xla" (shifted sums) or "pallas" (a kernel for TPUs, interpreted on CPU, and one
        for Hopper GPUs; float32 and bfloat16 x, up to 4 taps, on Hopper at least 2). None takes the fastest for the platform that the
        program is lowered for: "pallas" on TPU and on Hopper where D is a multiple of 128, "xla" elsewhere.

    Returns (output [B,T,D] in x's dtype, final_state [B,W-1,D]): the state is the last W-1 inputs, before the convolution, of the last
    real token's document, zeros before its start; float32 (float64 for float64 x), as is every sum.
    Differentiable in x, weight and initial_state.
    Raises ValueError for shapes that disagree, dtypes that are not floating point (segment_ids: integer), T = 0, an unknown activation
    or implementation.
    """
    sizes = _check(x, weight, activation, "causal_conv", "B T D", initial_state, "initial_state")
    checks.bind_shapes("causal_conv", {"segment_ids": (segment_ids, "B T")}, B=sizes["B"], T=sizes["T"])
    checks.check_segment_ids("causal_conv", segment_ids)
    checks.check_tokens("causal_conv", x=x)
    kernel = "pallas" if platforms.kernels(tpu, gpu).is_faster(x, weight) else None
    run = checks.choose("causal_conv", IMPLEMENTATIONS, implementation, default="xla", kernel=kernel)
    if sizes["B"] == 0:  # which no blocks are dealt out over
        return jnp.zeros_like(x), jnp.zeros_like(x, shape=(0, sizes["W"] - 1, sizes["D"]), dtype=jnp.promote_types(x.dtype, jnp.float32))
    return run(x, weight, activation, initial_state, None if segment_ids is None else segments.number(segment_ids))


def causal_conv_step(
    x: jax.Array, weight: jax.Array, state: jax.Array, *, activation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of :func:`causal_conv`, for decoding.

    x: [B,D]; weight: [D,W]; state: [B,W-1,D], the inputs before this token, oldest first; activation: None or "silu".
    Returns (output [B,D] in x's dtype, the next state [B,W-1,D] in float32, or float64 for float64 x).
    Raises ValueError for shapes that disagree, dtypes that are not floating point and an unknown activation.
    """
    _check(x, weight, activation, "causal_conv_step", "B D", state, "state")
    return reference.causal_conv_step(x, weight, state, activation)


def _check(x, weight, activation, operator: str, axes: str, state, state_name: str) -> dict[str, int]:
    checks.check_floating(operator, x=x, weight=weight, **{state_name: state})
    sizes = checks.bind_shapes(operator, {"x": (x, axes), "weight": (weight, "D W")})
    if sizes["W"] < 1:
        raise ValueError(f"{operator}: weight has shape {weight.shape}, needs at least one tap in its last axis")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operator}: no activation {activation!r}; choose one of {list(ACTIVATIONS)}")
    if state is not None:
        needed = (sizes["B"], sizes["W"] - 1, sizes["D"])
        if state.shape != needed:
            raise ValueError(f"{operator}: {state_name} has shape {state.shape}, needs {needed}: [B,W-1,D], the W-1 inputs before x")
    return sizes
