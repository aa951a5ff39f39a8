"""A command takes the flags that it reads, tells of all of them, and takes no others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEVERAL = {"coordinator", "process", "processes"}


def run(command, *arguments):
    return subprocess.run([sys.executable, "-m", f"experiments.{command}", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "some", "none"),
    [
        ("train", {"workdir", *SEVERAL}, {"step", "pairs"}),
        ("eval", {"workdir", "step", "suite", "pairs", "batch", *SEVERAL}, {"prompt"}),  # those of its suites too
        ("generate", {"workdir", "step", "prompt"}, SEVERAL),
        ("describe", {"workdir", "context"}, {"step", *SEVERAL}),
        ("sweep", {"size", "sweep"}, {"step", *SEVERAL}),
    ],
)
def test_help_names_the_flags_that_are_taken(command, some, none):
    named = set(re.findall(r"^  --(?:\[no\])?(\w+)", run(command, "--help").stdout, re.M))
    assert some <= named and not none & named


@pytest.mark.parametrize(
    ("command", "flag", "said"),
    [
        ("train", "--step=3", "Unknown command line flag 'step'"),  # it goes on from the newest checkpoint, whatever is asked
        ("describe", "--processes=2", "Unknown command line flag 'processes'"),
        ("sweep", "--workdir=runs", "each run of a sweep has a folder of its own: give --sweep=FOLDER"),
        ("report", "--workdir=runs", "give the folders of runs, such as --runs="),
    ],
)
def test_what_would_be_ignored_is_refused(command, flag, said):
    done = run(command, flag)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
