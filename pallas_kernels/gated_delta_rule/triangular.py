"""The inverse of unit lower triangular matrices, by matrix products alone."""
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 16  # below this, products over masked whole blocks are cheaper than ever smaller ones


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("gij,gjk->gik", x, y, precision=jax.lax.Precision.HIGHEST)


def inverse(lower: jax.Array) -> jax.Array:
    """(I + A)^-1 of the strictly lower triangular A = ``lower`` [G,C,C], C = 16, 32, 64, ...; in full precision.

    With the inverses X of the diagonal blocks of size s known, those of size 2s are

        [[X11, 0], [-X22 A21 X11, X22]]

    which takes 2 log2(C) products, none of them of powers of A: those grow and cancel where keys repeat.
    """
    G, C, _ = lower.shape
    X = _invert_blocks(_diagonal_blocks(lower, BLOCK, 0))
    size = BLOCK
    while size < C:
        A21 = _diagonal_blocks(lower, size, 1)
        X = X.reshape(-1, 2, size, size)
        X11, X22 = X[:, 0], X[:, 1]
        X21 = -_matmul(_matmul(X22, A21), X11)
        X = jnp.concatenate([jnp.concatenate([X11, jnp.zeros_like(X11)], 2), jnp.concatenate([X21, X22], 2)], 1)
        size *= 2
    return X.reshape(G, C, C)


def _diagonal_blocks(x: jax.Array, size: int, below: int) -> jax.Array:
    """[G,C,C] -> [G*C/size,size,size], the blocks on the diagonal; with ``below`` = 1 every second one of those just below it."""
    starts = range(0, x.shape[-1], size * (1 + below))
    blocks = [x[:, i + below * size : i + (1 + below) * size, i : i + size] for i in starts]
    return jnp.stack(blocks, 1).reshape(-1, size, size)


def _invert_blocks(A: jax.Array) -> jax.Array:
    """(I + A)^-1 of [G,BLOCK,BLOCK] by the same doubling, X - X A_s X, where A_s holds the blocks of A that level s joins."""
    row, column = np.arange(BLOCK)[:, None], np.arange(BLOCK)
    X = jnp.eye(BLOCK, dtype=A.dtype) - jnp.where(row // 2 == column // 2, A, 0)
    size = 2
    while size < BLOCK:
        joined = (row // (2 * size) == column // (2 * size)) & (row // size != column // size)
        X = X - _matmul(_matmul(X, jnp.where(joined, A, 0)), X)
        size *= 2
    return X
