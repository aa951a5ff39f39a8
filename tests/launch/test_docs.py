"""Every launcher's command in docs/launching.md is taken by that launcher; of launch.aot's what is known without compiling."""

import math
import re
import shlex

import pytest

from experiments import cli
from launch import accelerators, ahead
from tests.launch.stand_ins import ROOT, World

# read, not imported: flags of one name in two commands can not be in one process
FLAGS = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "launch" / "aot.py").read_text())

LAUNCHERS = ("tpu_vm", "gke", "slurm", "cloud_batch", "jobset")
PAGE = re.sub(r"\\\n\s*", "", (ROOT / "docs" / "launching.md").read_text())
BLOCK = "\n".join(re.findall(r"^ {4,}(\S.*)$", PAGE, re.M))
COMMANDS = [line for line in BLOCK.splitlines() if re.match(rf"python -m launch\.({'|'.join(LAUNCHERS)}) ", line)]

AHEAD = sorted(set(re.findall(r"python -m launch\.aot [^`#\n]*", PAGE)))


def test_there_are_some():
    assert len(AHEAD) > 3
    assert {shlex.split(command)[2] for command in COMMANDS} == {f"launch.{name}" for name in LAUNCHERS}


@pytest.mark.parametrize("command", COMMANDS)
def test_taken(command, tmp_path):
    world = World(tmp_path / "world")
    words = shlex.split(command.replace("PROJECT", "project").replace("BUCKET", "bucket"))
    at = words.index("--") if "--" in words else len(words)
    result = world.run(words[2], *words[3:at], "--dry_run", *words[at:])
    assert result.returncode == 0, result.stderr
    assert world.calls() == []


@pytest.mark.parametrize("command", AHEAD)
def test_ahead_of_time(command):
    words = shlex.split(command)[3:]
    given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    assert {word.split("=")[0] for word in words if not word.startswith("--config")} <= {f"--{name}" for name in FLAGS}
    config = cli.load_run([word for word in words if word.startswith("--config")], "").config
    target = accelerators.find_topology(given["topology"], int(given.get("slices", 1)))
    config = accelerators.with_mesh(config, given["mesh"]) if "mesh" in given else config
    assert math.prod(ahead.check(config, target).values()) == ahead.devices(target)
