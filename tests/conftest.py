"""Eight virtual CPU devices for every test, so that sharding is tested where there is one device; JAX's default stays the first.

Most of a test's time is the compiler's: programs are compiled quickly (tests/compiler.py), and kept, which takes two thirds off when the
tests are run again.
"""

import os
import shutil
import signal

import pytest

from tests import compiler
from tests.fake_gcs import gcs  # noqa: F401 (a fixture)

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {compiler.QUICK}"
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C, and so do its children
MOST = 2 * 10**9  # bytes of programs, after which they are begun anew


def pytest_configure(config):
    """Keep what is compiled, for both workers and for the next time."""
    import jax

    programs = config.rootpath / ".pytest_cache" / "programs"
    if not hasattr(config, "workerinput") and programs.exists() and sum(file.stat().st_size for file in programs.iterdir()) > MOST:
        shutil.rmtree(programs)
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_collection_modifyitems(items):
    """The longest file first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture
def one_device():
    """Its mesh in force, as where a model is trained: then what other platforms would run is not traced."""
    import jax

    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])):
        yield
