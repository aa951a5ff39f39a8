"""The flag of the commands that put a token before what a model reads."""

from absl import flags

BEGINNING = flags.DEFINE_integer(
    "beginning", None, "A token to stand before every text, such as 1 for a published model that was trained with <s>.", lower_bound=0
)
