"""The flag of the commands that make or read a run's folder. Its help is the trainer's; the others say what it is to them."""

import os

from absl import flags
from etils import epath

from hybrid_jax.storage import run_folder

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The folder of the run, or gs://BUCKET/FOLDER, for its checkpoints, metrics, summary and picture; runs/NAME-SIZE if not given.",
)


def of(name: str) -> epath.Path:
    """``--workdir``, or runs/NAME under the current folder."""
    return run_folder(WORKDIR.value or os.path.join("runs", name))
