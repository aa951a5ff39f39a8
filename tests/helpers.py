"""What the tests share: errors measured one way, and rows of documents worth testing."""

import jax
import jax.numpy as jnp
import numpy as np


def relative_error(out, reference) -> float:
    """||out - reference|| / ||reference||, in float64; the plain norm of ``out`` where the reference is all zeros."""
    out, reference = np.asarray(out, np.float64), np.asarray(reference, np.float64)
    assert out.shape == reference.shape, (out.shape, reference.shape)
    scale = np.linalg.norm(reference)
    return float(np.linalg.norm(out - reference) / (scale if scale else 1.0))


def tree_errors(out, reference) -> dict[str, float]:
    """The relative error of every leaf of two trees of one structure, by path."""
    reference_leaves = dict(jax.tree_util.tree_leaves_with_path(reference))
    leaves = dict(jax.tree_util.tree_leaves_with_path(out))
    assert leaves.keys() == reference_leaves.keys()
    return {jax.tree_util.keystr(path): relative_error(leaves[path], reference_leaves[path]) for path in leaves}


def random_segment_ids(rng: np.random.Generator, B: int, T: int, mean_length: float = 8.0, padding: float = 0.15):
    """[B,T] int32: documents of random length, ids reused and not consecutive, with runs of padding between and inside them."""
    rows = np.zeros((B, T), np.int32)
    for row in rows:
        t = 0
        while t < T:
            length = 1 + rng.geometric(1.0 / mean_length)
            row[t : t + length] = 0 if rng.random() < padding else rng.integers(1, 4)
            t += length
    return jnp.asarray(rows)
