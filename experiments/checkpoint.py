"""The flag of the commands that read one of a run's checkpoints."""

from absl import flags

STEP = flags.DEFINE_integer("step", None, "The step whose checkpoint is read; the newest if not given.", lower_bound=0)
