"""Documents and padding written into the decay and the input: what makes any linear recurrence respect segments."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.segments import Segments


def by_masking(scan: Callable) -> Callable:
    """The ``linear_scan`` of whole rows, (decay, x, initial_state) of one dtype, as one of segments and of any dtypes."""

    def run(decay: jax.Array, x: jax.Array, initial_state: jax.Array, segments: Segments | None):
        dtype = jnp.result_type(decay, x, jnp.float32)
        out_dtype = x.dtype
        decay, x, initial_state = decay.astype(dtype), x.astype(dtype), initial_state.astype(dtype)
        if segments is None:
            h, final_state = scan(decay, x, initial_state)
            return h.astype(out_dtype), final_state
        # Padding keeps the state (decay 1, input 0); a document's first token forgets it (decay 0).
        real, starts = segments.real[..., None], segments.starts[..., None]
        decay = jnp.where(real, jnp.where(starts, 0, decay), 1)
        h, final_state = scan(decay, jnp.where(real, x, 0), initial_state)
        return jnp.where(real, h, 0).astype(out_dtype), final_state

    return run
