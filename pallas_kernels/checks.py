"""Argument checks shared by the operators: a wrong shape, dtype or name is a ValueError that says what to do."""

import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import platforms

KERNEL_DTYPES = (jnp.float32, jnp.bfloat16)  # that the Pallas kernels take


def bind_shapes(operator: str, arguments: Mapping[str, tuple[jax.Array | None, str]], **sizes: int) -> dict[str, int]:
    """Read sizes off the arguments' shapes and check that they agree.

    arguments: name -> (array or None, its axes as letters, such as ``"B T H K"``); None is skipped.
    sizes: letters known beforehand.
    Returns letter -> size. Raises ValueError naming the operator, the argument, what it got and what it needs, an array to begin with.
    """
    source: dict[str, str] = {}
    for name, (array, axes) in arguments.items():
        if array is None:
            continue
        _check_array(operator, name, array)
        letters = axes.split()
        if array.ndim != len(letters):
            raise ValueError(f"{operator}: {name} has shape {array.shape}, needs {len(letters)} axes [{','.join(letters)}]")
        for letter, size in zip(letters, array.shape, strict=True):
            if letter in sizes and sizes[letter] != size:
                origin = f" (from {source[letter]})" if letter in source else ""
                raise ValueError(
                    f"{operator}: {name} has shape {array.shape}, needs [{','.join(letters)}] with {letter}={sizes[letter]}{origin}"
                )
            sizes[letter] = size
            source.setdefault(letter, name)
    return sizes


def check_floating(operator: str, **arrays: jax.Array | None) -> None:
    """Raise ValueError for what is no array (None is skipped), or one that is not floating point."""
    for name, array in arrays.items():
        if array is None:
            continue
        _check_array(operator, name, array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{operator}: {name} has dtype {array.dtype}, needs a floating-point dtype")


def _check_array(operator: str, name: str, array) -> None:
    if not hasattr(array, "dtype"):
        raise ValueError(f"{operator}: {name} is a {type(array).__name__}, needs an array")


def check_segment_ids(operator: str, segment_ids: jax.Array | None) -> None:
    """Raise ValueError for segment ids that are not integers."""
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"{operator}: segment_ids has dtype {segment_ids.dtype}, needs integers (0 marks padding)")


def check_tokens(operator: str, **arrays: jax.Array) -> None:
    """Raise ValueError for an array [B,T,...] without a token: T = 0. Without a row, B = 0, there is just nothing to do."""
    for name, array in arrays.items():
        if array.shape[1] == 0:
            raise ValueError(f"{operator}: {name} has shape {array.shape}, needs T >= 1")


def check_kernel_dtypes(operator: str, **arrays: jax.Array) -> None:
    """Raise ValueError for an array that a Pallas kernel does not take."""
    for name, array in arrays.items():
        if array.dtype not in KERNEL_DTYPES:
            raise ValueError(f"{operator}: {name} has dtype {array.dtype}, needs float32 or bfloat16 for implementation='pallas'")


def choose(operator: str, implementations: Mapping[str, Callable], name: str | None, default: str, kernel: str | None = None) -> Callable:
    """The implementation called ``name``; where it is None the ``default``, or ``kernel`` where that is lowered for its accelerator.

    In a program that XLA partitions over devices by itself None stands for the ``default`` everywhere: a kernel cannot be partitioned.
    What runs is in the scope ``operator.name``, for profiles and :func:`implementations_in`. Raises ValueError for an unknown name.
    """

    def scoped(name):
        return jax.named_scope(f"{operator}.{name}")(implementations[name])

    if name is None and kernel is not None and not platforms.is_partitioned():
        return platforms.on_accelerator(scoped(kernel), elsewhere=scoped(default))
    name = default if name is None else name
    if name not in implementations:
        raise ValueError(f"{operator}: no implementation {name!r}; choose one of {sorted(implementations)} or None")
    return scoped(name)


def implementations_in(scope: str, program: str) -> dict[str, list[str]]:
    """operator -> its implementations that run inside ``jax.named_scope(scope)``, of the text of a compiled program; both sorted."""
    paths = re.findall(rf'op_name="[^"]*\b{scope}\b[^"]*?/(\w+)\.([a-z_]+)[/"]', program)
    operators = sorted({operator for operator, _ in paths})
    return {operator: sorted({name for found, name in paths if found == operator}) for operator in operators}
