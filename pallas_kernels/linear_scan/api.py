"""The public face of the gated elementwise recurrence, h_t = a_t * h_{t-1} + x_t: arguments checked, documents written into them."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import checks, platforms, segments
from pallas_kernels.linear_scan import associative_scan, gpu, reference, tpu, xla


def _widened(scan: Callable) -> Callable:
    """A scan of arrays of one dtype, float32 or wider, as one of any dtypes."""

    def run(decay, x, initial_state):
        dtype = jnp.result_type(decay, x, jnp.float32)
        h, final_state = scan(decay.astype(dtype), x.astype(dtype), initial_state.astype(dtype))
        return h.astype(x.dtype), final_state

    return run


def _kernel(decay, x, initial_state):
    return platforms.kernels(tpu, gpu).linear_scan(decay, x, initial_state)


# Each of whole rows: (decay, x, initial_state) -> (h, final_state).
IMPLEMENTATIONS = {
    "reference": _widened(reference.linear_scan),
    "xla": _widened(xla.linear_scan),
    "associative_scan": _widened(associative_scan.linear_scan),
    "pallas": _kernel,
}


def linear_scan(
    decay: jax.Array,
    x: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gated elementwise recurrence, h_t = decay_t * h_{t-1} + x_t (HGRN, Qin et al. 2023, eq. 4, with x = (1 - decay) * v).

    decay: [B,T,D], any B, the linear (not log) decay, in [0, 1].
    x: [B,T,D], any T >= 1.
    initial_state: [B,D], h before the first real token; zeros where None.
    segment_ids: [B,T] integers. The state starts at zero where the id changes; 0 marks padding, which changes no state and
        whose output is 0. ``initial_state`` belongs to the first real token's segment, the final state to the last one's.
    implementation: "reference" (token by token), "xla" (blocks side by side), "associative_scan" or "pallas" (a kernel for
        TPUs, interpreted on CPU, and one for Hopper GPUs; float32 and bfloat16). None takes the fastest for the platform that the
        program is lowered for: "pallas" on TPU and on Hopper where D is a multiple of 128, "xla" elsewhere.

    Returns (h [B,T,D] in x's dtype, final_state [B,D] in float32). Sums run in float32, in float64 where an input is float64.
    Differentiable in decay, x and initial_state. Raises ValueError for shapes, dtypes or names that do not fit.
    """
    operator = "linear_scan"
    sizes = checks.bind_shapes(
        operator,
        {"x": (x, "B T D"), "decay": (decay, "B T D"), "initial_state": (initial_state, "B D"), "segment_ids": (segment_ids, "B T")},
    )
    checks.check_floating(operator, decay=decay, x=x, initial_state=initial_state)
    checks.check_segment_ids(operator, segment_ids)
    checks.check_tokens(operator, x=x)
    kernel = "pallas" if platforms.kernels(tpu, gpu).is_faster(decay, x) else None
    scan = checks.choose(operator, IMPLEMENTATIONS, implementation, default="xla", kernel=kernel)

    if initial_state is None:
        initial_state = jnp.zeros_like(x[:, 0])
    if sizes["B"] == 0:  # which no blocks are dealt out over
        return jnp.zeros_like(x), initial_state.astype(jnp.result_type(decay, x, jnp.float32))
    (decay, x), real = with_documents(decay, x, segment_ids)
    h, final_state = scan(decay, x, initial_state)
    return h if real is None else jnp.where(real, h, 0), final_state


def with_documents(decay: jax.Array, x: jax.Array, segment_ids: jax.Array | None):
    """((decay, x) that forget at a document's start and pass over padding by themselves, [B,T,1] bool False at padding or None)."""
    if segment_ids is None:
        return (decay, x), None
    numbered = segments.number(segment_ids)
    real, starts = numbered.real[..., None], numbered.starts[..., None]
    decay = jnp.where(real, jnp.where(starts, 0, decay), 1)
    return (decay, jnp.where(real, x, 0)), real


def linear_scan_step(decay: jax.Array, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token of :func:`linear_scan`: decay, x and state [B,D] -> (h in x's dtype, state in float32 or wider)."""
    operator = "linear_scan_step"
    checks.bind_shapes(operator, {"x": (x, "B D"), "decay": (decay, "B D"), "state": (state, "B D")})
    checks.check_floating(operator, decay=decay, x=x, state=state)
    dtype = jnp.promote_types(jnp.promote_types(decay.dtype, x.dtype), jnp.float32)
    state = decay.astype(dtype) * state.astype(dtype) + x.astype(dtype)
    return state.astype(x.dtype), state
