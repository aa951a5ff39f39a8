"""Eight virtual CPU devices for every test, so that sharding is tested where there is one device; JAX's default stays the first.

Most of a test's time is LLVM's, on programs that run once: they are not optimised, which takes a third off.
"""

import os
import signal

from tests.fake_gcs import gcs  # noqa: F401 (a fixture)

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C, and so do its children


def pytest_collection_modifyitems(items):
    """The longest file first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
