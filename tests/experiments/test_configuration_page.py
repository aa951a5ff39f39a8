"""docs/configuration.md has every field of the configuration, and is what the code says now."""

import dataclasses

import pytest

from experiments.reports import configuration as page
from hybrid_jax.config import MIXERS, CheckpointConfig, DataConfig, MQARConfig, run


def test_the_page_is_that_of_the_code():
    assert page.PAGE.read_text() == page.page(), "run python -m experiments.reports.configuration"


CLASSES = [*MIXERS.values(), *(cls for cls in vars(run).values() if dataclasses.is_dataclass(cls) and cls is not run.RunConfig)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_says_what_it_is(cls):
    assert not [name for name, comment in page.comments(cls).items() if not comment]


def test_a_comment_stands_above_its_field_or_behind_it():
    assert page.comments(CheckpointConfig)["keep"] == "how many checkpoints, the newest, are kept"
    assert page.comments(DataConfig)["packing"].startswith('"windows": documents end to end')
    assert page.comments(run.ModelConfig)["ratio"].endswith("list of 0-based layers. None: every layer is `mixer`")


def test_types_and_defaults_are_those_that_are_typed():
    section = page.section(DataConfig, "config.data", "`config.data`")
    assert '| `source` | `str` | `"stdlib"` |' in section and "| [its own fields](#configdatamqar) |" in section
    assert '| `packing` | `"windows"`, `"documents"` | `"windows"` |' in section
    assert "| `length` | integers | `(64,)` |" in page.section(MQARConfig, "config.data.mqar", "")
    assert "| `every`* | `int` or `None` | `None` |" in page.section(run.EvaluationConfig, "config.evaluation", "")
