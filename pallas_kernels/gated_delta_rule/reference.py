"""The gated delta rule one token after another: slow, and obviously right."""
import jax
import jax.numpy as jnp

from pallas_kernels.segments import Segments


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    segments: Segments | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as :mod:`.api` prepares them; a ``lax.scan`` over T. Its gradient keeps a state for every token."""
    dtype, groups = initial_state.dtype, v.shape[2] // q.shape[2]
    inputs = {"q": q, "k": k, "v": v, "beta": beta} | ({} if log_decay is None else {"log_decay": log_decay})
    inputs = {name: x.astype(dtype) for name, x in inputs.items()}
    if segments is not None:
        real = segments.real
        inputs = {name: jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0) for name, x in inputs.items()}
        inputs["starts"] = jnp.diff(segments.index, axis=1, prepend=segments.index[:, :1]) > 0
    inputs["q"] = jnp.repeat(scale * inputs["q"], groups, axis=2)
    inputs["k"] = jnp.repeat(inputs["k"], groups, axis=2)

    def step(S, token):
        if segments is not None:
            S = jnp.where(token["starts"][:, None, None, None], 0, S)
        output, S = update(token["q"], token["k"], token["v"], token["beta"], token.get("log_decay"), S)
        return S, output

    final_state, output = jax.lax.scan(step, initial_state, {name: jnp.moveaxis(x, 1, 0) for name, x in inputs.items()})
    return jnp.moveaxis(output, 0, 1).astype(v.dtype), final_state


def update(q, k, v, beta, log_decay, S):
    """One token: (S'^T q, S') with S' = D + beta k (v - D^T k)^T, which is (I - beta k k^T) D + beta k v^T, and D = diag(exp g) S.

    q, k [B,H,K]   v [B,H,V]   beta [B,H]   log_decay None | [B,H] | [B,H,K]   S [B,H,K,V]
    """
    if log_decay is not None:
        S = S * jnp.exp(log_decay.reshape(log_decay.shape + (1,) * (4 - log_decay.ndim)))
    error = v - _read(S, k)
    S = S + k[..., None] * (beta[..., None] * error)[..., None, :]
    return _read(S, q), S


def _read(S, key):
    return jnp.einsum("bhk,bhkv->bhv", key, S, precision=jax.lax.Precision.HIGHEST)
