"""Inside a Mosaic TPU kernel: the inverses of unit lower triangular matrices, those of several heads side by side.

The C / s diagonal blocks of size s lie packed as [s,C], side by side. Those of 8 are inverted by forward substitution, one
multiplication of whole registers a column; then two blocks of size s and what lies below the first give one of size 2 s,

    [[X11, 0], [-X22 A21 X11, X22]]

where the packed blocks are the left operand of both products, so that few rows pass through the matrix unit. No power of A is
ever formed: those grow and cancel where keys repeat. The last level is left to :func:`solve`, by which half of its rows do, once.
"""

import jax
import jax.numpy as jnp

BLOCK = 8


def inverses(lower: list[jax.Array], dtype) -> list[jax.Array]:
    """Of the strictly lower part A of each [C,C] in float32, C = 16, 32, 64, ..., the inverses of the two diagonal blocks of I + A,
    side by side as [C/2,C] in float32.

    Where ``dtype`` is bfloat16 operands of products keep 16 of their 24 bits, else all.
    """
    C = lower[0].shape[0]
    packed = _inverses_of_blocks([_pack(A) for A in lower])
    split, multiply = (_halves, _product_of_halves) if dtype == jnp.bfloat16 else (_whole, _exact_product)
    lower = [split(A) for A in lower]
    size = BLOCK
    while size < C // 2:
        operands = [split(X) for X in packed]
        products = [multiply(X, [_below(part, size) for part in A]) for X, A in zip(operands, lower, strict=True)]
        products = [multiply(split(M), [_spread(part) for part in X]) for M, X in zip(products, operands, strict=True)]
        early = _lane(size, C) & size == 0
        packed = [
            jnp.concatenate([jnp.where(early, X, 0), jnp.where(early, -X21, X)], axis=0) for X, X21 in zip(packed, products, strict=True)
        ]
        size *= 2
    return packed


def solve(inverse: list[jax.Array], below: list[jax.Array], x: list[jax.Array]) -> list[jax.Array]:
    """(I + A)^-1 x of each x [C,V] float32, by blocks: ``inverse`` [C/2,C] as :func:`inverses` has it, ``below`` [C/2,C/2] = A21.

    Operands of products are rounded to ``inverse``'s dtype, and so is the result.
    """
    half, dtype, heads = below[0].shape[0], below[0].dtype, range(len(x))
    first = [_exact(inverse[h][:, :half], x[h][:half].astype(dtype)).astype(dtype) for h in heads]
    rest = [(x[h][half:] - _exact(below[h], first[h])).astype(dtype) for h in heads]
    second = [_exact(inverse[h][:, half:], rest[h]).astype(dtype) for h in heads]
    return [jnp.concatenate([first[h], second[h]], axis=0) for h in heads]


def whole(inverse: list[jax.Array], below: list[jax.Array]) -> list[jax.Array]:
    """(I + A)^-1 [C,C] from its blocks, as in :func:`solve`, in their dtype."""
    half, dtype, heads = below[0].shape[0], below[0].dtype, range(len(below))
    below = [_exact(inverse[h][:, half:], below[h]).astype(dtype) for h in heads]
    below = [-_exact(below[h], inverse[h][:, :half]).astype(dtype) for h in heads]
    zeros = jnp.zeros((half, half), dtype)
    above = [jnp.concatenate([x[:, :half], zeros], axis=1) for x in inverse]
    return [jnp.concatenate([above[h], jnp.concatenate([below[h], inverse[h][:, half:]], axis=1)], axis=0) for h in heads]


def _inverses_of_blocks(packed: list[jax.Array]) -> list[jax.Array]:
    """(I + A)^-1 of blocks A of size BLOCK, both packed [BLOCK,C], by rows from the top."""
    C = packed[0].shape[1]
    lane = _lane(BLOCK, C)
    identity = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, C), 0) == lane & (BLOCK - 1)).astype(jnp.float32)
    X = [identity] * len(packed)
    for j in range(BLOCK - 1):
        # A_ij in all lanes of its block, 0 for i <= j: row j of X is complete and every row below takes its share of it.
        columns = [jnp.take_along_axis(A, (lane & -BLOCK) + j, axis=1) for A in packed]
        X = [x - column * x[j : j + 1] for x, column in zip(X, columns, strict=True)]
    return X


def _pack(x: jax.Array) -> jax.Array:
    """What is strictly lower in the diagonal blocks of [C,C], packed as [BLOCK,C]."""
    C = x.shape[0]
    packed = x[:BLOCK]
    for start in range(BLOCK, C, BLOCK):
        packed = jnp.where(_lane(BLOCK, C) < start, packed, x[start : start + BLOCK])
    lane, row = _lane(BLOCK, C), jax.lax.broadcasted_iota(jnp.int32, (BLOCK, C), 0)
    return jnp.where(lane & (BLOCK - 1) < row, packed, 0)


def _spread(packed: jax.Array) -> jax.Array:
    """Packed blocks [s,C] -> [C,C] with every second one, from the first on, on the diagonal and 0 elsewhere."""
    size, C = packed.shape
    block, zeros = _lane(size, C) >> size.bit_length() - 1, jnp.zeros_like(packed)
    return jnp.concatenate([zeros if n % 2 else jnp.where(block == n, packed, 0) for n in range(C // size)], axis=0)


def _below(x: jax.Array, size: int) -> jax.Array:
    """[C,C] with 0 for all but the blocks just below those that :func:`_spread` keeps."""
    C = x.shape[0]
    block, zeros = _lane(size, C) >> size.bit_length() - 1, jnp.zeros_like(x[:size])
    rows = [x[start : start + size] for start in range(0, C, size)]
    return jnp.concatenate([jnp.where(block == n - 1, x, 0) if n % 2 else zeros for n, x in enumerate(rows)], axis=0)


def _lane(rows: int, C: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (rows, C), 1)


def _whole(x: jax.Array) -> list[jax.Array]:
    return [x]


def _exact_product(x: list[jax.Array], y: list[jax.Array]) -> jax.Array:
    return _exact(*x, *y)


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y in float32, of float32 operands with all their bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def _halves(x: jax.Array) -> list[jax.Array]:
    """Two bfloat16 arrays whose sum is the float32 ``x`` to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def _product_of_halves(x: list[jax.Array], y: list[jax.Array]) -> jax.Array:
    """x y, all four products of their halves in one pass of the matrix unit where it is 256 wide."""
    rows, columns = x[0].shape[0], y[0].shape[1]
    products = jnp.dot(jnp.concatenate(x, axis=0), jnp.concatenate(y, axis=1), preferred_element_type=jnp.float32)
    return products[:rows, :columns] + (products[:rows, columns:] + products[rows:, :columns])
