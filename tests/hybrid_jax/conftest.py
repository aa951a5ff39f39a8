"""What the tests of the models share."""

import jax
import pytest

from hybrid_jax.config import MeshConfig
from hybrid_jax.sharding import make_mesh


@pytest.fixture
def one_device():
    """Its mesh in force, as where a model is trained: what other platforms would run is not traced."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        yield
