"""S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t, token by token: slow, plainly right."""
import jax
import jax.numpy as jnp

from pallas_kernels.segments import Segments


def gated_linear_attention(q, k, v, log_decay, initial_state, segments: Segments | None, scale):
    """Arguments as :mod:`.api` prepares them: (o [B,T,HV,V] in v's dtype, the final state [B,HV,K,V])."""
    B, T = q.shape[:2]
    log_decay = jnp.broadcast_to(log_decay, (B, T, *log_decay.shape)) if log_decay.ndim == 1 else log_decay
    if segments is None:
        real, starts = jnp.ones((B, T), bool), jnp.zeros((B, T), bool)
    else:
        real, starts = segments.real, jnp.diff(segments.index, axis=1, prepend=0) > 0

    def token(state, x):
        (q, k, v, log_decay), real, starts = x

        def select(x, otherwise):
            return jnp.where(real.reshape(B, *[1] * (x.ndim - 1)), x, otherwise)

        state_before = jnp.where(starts[:, None, None, None], 0, state)
        o, state_after = step(*(select(x, 0) for x in (q, k, v, log_decay)), state_before)
        return select(state_after, state), select(scale * o, 0).astype(v.dtype)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), ((q, k, v, log_decay), real, starts))
    final_state, o = jax.lax.scan(token, initial_state, tokens)
    return jnp.moveaxis(o, 0, 1), final_state


def step(q, k, v, log_decay, state):
    """One token, unscaled: q, k [B,H,K], v [B,HV,V], log_decay [HV], [B,HV] or [B,HV,K], state -> (o [B,HV,V], state)."""
    q, k, v, log_decay = (x.astype(state.dtype) for x in (q, k, v, log_decay))
    group = v.shape[1] // q.shape[1]
    q, k = jnp.repeat(q, group, axis=1), jnp.repeat(k, group, axis=1)
    decay = jnp.exp(log_decay)
    decay = decay[..., None] if log_decay.ndim == 3 else decay[..., None, None]
    state = decay * state + k[..., None] * v[:, :, None, :]
    return jnp.einsum("bhk,bhkv->bhv", q, state), state
