"""Every launcher's command in docs/launching.md is taken by that launcher."""

import re
import shlex

import pytest

from tests.launch.stand_ins import ROOT, World

PAGE = (ROOT / "docs" / "launching.md").read_text()
BLOCK = re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"^ {4,}(\S.*)$", PAGE, re.M)))
COMMANDS = [line for line in BLOCK.splitlines() if re.match(r"python -m launch\.(tpu_vm|gke|slurm|cloud_batch) ", line)]


def test_there_are_some():
    assert {shlex.split(command)[2] for command in COMMANDS} == {"launch.tpu_vm", "launch.gke", "launch.slurm", "launch.cloud_batch"}


@pytest.mark.parametrize("command", COMMANDS)
def test_taken(command, tmp_path):
    world = World(tmp_path / "world")
    words = shlex.split(command.replace("PROJECT", "project").replace("BUCKET", "bucket"))
    at = words.index("--") if "--" in words else len(words)
    result = world.run(words[2], *words[3:at], "--dry_run", *words[at:])
    assert result.returncode == 0, result.stderr
    assert world.calls() == []
