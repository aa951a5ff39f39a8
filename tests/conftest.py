"""Eight virtual CPU devices for every test, so that sharding is tested where there is one device; JAX's default stays the first."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
