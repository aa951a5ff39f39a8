"""A model called as in a notebook: without a mesh, on whatever there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import config
from hybrid_jax import model as models
from tests.helpers import relative_error
from tests.hybrid_jax.test_model import build, random_tokens


def test_a_model_is_called_without_more_ado():
    """On lists too, compiled once for each shape, and on nothing that it does not know."""
    model = build(config.GLA(heads=2))
    tokens = random_tokens(2, 5)
    expected = jax.jit(lambda tokens: model.logits(model.hidden(tokens)))(tokens)
    models._logits.clear_cache()
    for given in (tokens, np.asarray(tokens), tokens.tolist()):
        assert relative_error(model(given), expected) < 1e-6
    assert models._logits._cache_size() == 1
    segment_ids = [[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]]
    assert relative_error(model(tokens, segment_ids), jax.jit(model)(tokens, jnp.asarray(segment_ids))) < 1e-6
    wrong = {r"shape \(2,\)": [1, 2], "dtype float64": [[0.5]], "holds 61, needs tokens from 0 to 60": [[3, 61]], "holds -1": [[-1, 3]]}
    for said, given in wrong.items():
        with pytest.raises(ValueError, match=said):
            model(given)
