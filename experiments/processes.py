"""The flags of a run of several processes, where nothing else tells them of one another, for the commands that are such runs."""

from absl import flags

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of a run's processes, where neither Cloud TPU, SLURM, Kubernetes nor Open MPI tells it."
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has; goes with --coordinator.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process", None, "Which of the --processes this one is, from 0; goes with --coordinator.", lower_bound=0)


def connect(stops_together: bool = False) -> None:
    """Join the other processes of this run, if there are any; before JAX is used. As `hybrid_jax.distributed.connect`."""
    from hybrid_jax import distributed

    distributed.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value, stops_together=stops_together)
