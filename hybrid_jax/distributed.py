"""The processes of one run: how they find one another, and how they end together where one is lost."""

import os
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from hybrid_jax.config import ConfigError

ALONE = "coordinator_address should be defined"  # what JAX says where nothing tells of other processes
LOST = ("Gloo", "UNAVAILABLE", "heartbeat", "Barrier failed")  # and where they cannot be reached

_connected = False


def connect(coordinator: str | None = None, count: int | None = None, index: int | None = None, *, stops_together: bool = False) -> None:
    """Join the other processes of this run, before JAX is used for anything else. Alone, nothing happens.

    coordinator: "HOST:PORT" of the first process, any free port. count: of the processes. index: this one's, from 0.
        Without them, they are what Cloud TPU, SLURM, Kubernetes (with the package `kubernetes`) or Open MPI tell.
    stops_together: SIGTERM to one of them is for all, and acted on where `train.signals.Stop` is asked; else it ends a process as usual.

    Raises ConfigError where some are given and not all, or they do not go together.
    """
    global _connected
    given = (coordinator, count, index)
    if any(x is not None for x in given):
        if None in given:
            raise ConfigError("give all of --coordinator=HOST:PORT, --processes=COUNT and --process=INDEX, or none of them")
        if not 0 <= index < count:
            raise ConfigError(f"--process={index} must be from 0 to {count - 1}, below --processes={count}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.1:8476")
    jax.config.update("jax_enable_preemption_service", stops_together)
    try:
        jax.distributed.initialize(*given)
    except ValueError as error:
        if ALONE not in str(error):
            raise ConfigError(f"the processes of this run do not find one another: {error}") from None
    else:
        _connected = True


def connected() -> bool:
    """Whether this process has joined others."""
    return _connected


def loss(error: Exception) -> str | None:
    """What to say of an error that comes of another process being lost; None of any other error."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or not any(sign in str(error) for sign in LOST):
        return None
    return (
        f"another process of this run ended or cannot be reached ({str(error).splitlines()[0]}): see what it said; "
        "start all of them again, as many as you like, to go on from the last checkpoint"
    )


def gather(content: bytes) -> list[bytes]:
    """The ``content`` of every process, in their order; called by all of them."""
    if jax.process_count() == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.array(len(content), np.int32))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return [row[:size].tobytes() for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)]


def leave(code: int) -> NoReturn:
    """End this process at once: JAX's own end waits for all the others, which may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
