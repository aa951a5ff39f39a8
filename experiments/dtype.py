"""The flag of the commands that can compute in another dtype than the model was trained in."""

from absl import flags

DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "What the model computes in; by default what its configuration says.")
