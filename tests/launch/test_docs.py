"""Every launcher's command in the pages on launching is taken by that launcher, and prints what the page says it prints with --dry_run;
of launch.aot's commands what is known without compiling. Their flags: `tests/test_docs.py`."""

import math
import re
import shlex

import pytest

from experiments import cli
from launch import ahead, topologies
from tests.launch.stand_ins import ROOT, World

LAUNCHERS = ("tpu_vm", "gke", "slurm", "cloud_batch", "jobset")
PAGES = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("launching", "token_store", "aot")]
PAGE = re.sub(r"\\\n\s*", "", "\n".join(PAGES))
BLOCK = "\n".join(re.findall(r"^ {4,}(\S.*)$", PAGE, re.M))
LAUNCHER = rf"python -m launch\.(?:{'|'.join(LAUNCHERS)}) "
COMMANDS = [line for line in BLOCK.splitlines() if re.match(LAUNCHER, line)]
# A command, text of which the last word is "prints", and an indented block.
PRINTED = re.findall(rf"^ {{4}}({LAUNCHER}.*)\n\n(?:\S.*\n)*(?:.*[ ])?prints\n\n((?: {{4}}.*\n)+)", PAGE, re.M)

AHEAD = sorted(set(re.findall(r"python -m launch\.aot [^`#\n]*", PAGE)))


def test_there_are_some():
    assert len(AHEAD) > 3
    assert {shlex.split(command)[2] for command in COMMANDS} == {f"launch.{name}" for name in LAUNCHERS}


def named(text):
    """With names for PROJECT and BUCKET."""
    return text.replace("PROJECT", "project").replace("BUCKET", "bucket")


def dry_run(command, folder):
    """What a command of the page prints with --dry_run, without a note on this checkout."""
    world = World(folder / "world")
    words = shlex.split(named(command))
    at = words.index("--") if "--" in words else len(words)
    result = world.run(words[2], *words[3:at], "--dry_run", *words[at:])
    assert result.returncode == 0, result.stderr
    assert world.calls() == []
    return "".join(line for line in result.stdout.splitlines(keepends=True) if not line.startswith("note: not copied"))


@pytest.mark.parametrize("command", COMMANDS)
def test_taken(command, tmp_path):
    dry_run(command, tmp_path)


def test_the_page_shows_what_each_of_them_prints():
    shown = [shlex.split(command) for command, _ in PRINTED]
    assert {words[2] for words in shown} == {f"launch.{name}" for name in LAUNCHERS}
    assert {any("--array" in word for word in words) for words in shown if words[2] == "launch.slurm"} == {False, True}


@pytest.mark.parametrize("command, shown", PRINTED)
def test_printed(command, shown, tmp_path):
    """Line by line, whole but for what ``...`` stands for: the rest of a line or a part of it, or, alone, any lines."""
    lines = [line.removeprefix("    ") for line in named(shown).splitlines()]
    form = "".join("(.*\n)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in lines)
    assert re.fullmatch(form, dry_run(command, tmp_path)), f"of {command} the page shows another output"


@pytest.mark.parametrize("command", AHEAD)
def test_ahead_of_time(command):
    words = shlex.split(command)[3:]
    given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    config = cli.load_run([word for word in words if word.startswith("--config")], "").config
    target = topologies.find(given["topology"], int(given.get("slices", 1)))
    config = topologies.with_mesh(config, given["mesh"]) if "mesh" in given else config
    assert math.prod(ahead.check(config, target).values()) == ahead.devices(target)
