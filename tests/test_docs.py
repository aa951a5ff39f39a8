"""What the pages say can be typed, opened and read: every command's flags and configuration, every link, every file's name.

`test_readme.py` runs the README's commands, `launch/test_docs.py` those of the launchers.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

from experiments import cli

ROOT = Path(__file__).parent.parent
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMAND = re.compile(r"python -m ((?:experiments|launch)\.\w+)((?:\\\n|[^`\n])*)")


def flags_of(module: str) -> set[str]:
    """The flags that a command takes: those that it defines, and those of modules of its package that it imports to begin with."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    flags = {call.args[0].value for call in calls if call.func.attr.startswith("DEFINE_")}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in ("experiments", "launch"):
            for name in node.names:
                if (ROOT / node.module / f"{name.name}.py").exists() and name.name != "cli":
                    flags |= flags_of(f"{node.module}.{name.name}")
    return flags


def commands() -> list[tuple[str, str, str]]:
    """(page, module, its words) of every command that is there whole; after a launcher's ``--`` another begins."""
    found = []
    for page, text in PAGES.items():
        for module, words in COMMAND.findall(text):
            first, _, rest = words.replace("\\\n", " ").partition(" -- ")
            found.append((page, module, first))
            found += [(page, *pair) for pair in COMMAND.findall(rest)]
    return list(dict.fromkeys(found))


COMMANDS = commands()


def test_there_are_some():
    assert {page for page, *_ in COMMANDS} >= {"README.md", "docs/evaluation.md", "docs/generation.md", "docs/launching.md", "docs/tpu.md"}
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_flags_that_they_are_shown_with(page):
    for module, text in ((module, text) for of, module, text in COMMANDS if of == page):
        words = [word for word in shlex.split(text, comments=True) if word.startswith("--") and "..." not in word]
        given = {re.match(r"--([\w.]*)", word)[1] for word in words} - {""}
        known = flags_of(module)
        wrong = {name for name in given if name not in known and name.removeprefix("no") not in known and name.split(".")[0] != "config"}
        assert not wrong, f"{page}: {module} has no --{', --'.join(wrong)}"
        if any(word.startswith("--config=") for word in words):
            cli.load_run([word for word in words if re.match(r"--config[.=]", word)], "")


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {path}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page}: {path}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    made = {"experiments/results/gpu.jsonl"}  # by `experiments.bench --suite=gpu`, on a GPU
    named = set(re.findall(r"`((?:hybrid_jax|pallas_kernels|experiments|launch|tests|docs)/[\w/.]+\.\w+)`", PAGES[page])) - made
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
    alone = set(re.findall(r"`(\w+\.py)`", PAGES[page]))
    assert alone <= {
        file.name for folder in ("hybrid_jax", "pallas_kernels", "experiments", "tests") for file in (ROOT / folder).rglob("*.py")
    }


@pytest.mark.parametrize("size, written", [("tiny", ":tiny"), ("340m", ""), ("1b3", ":1b3")])
def test_the_readmes_sizes_are_those_of_the_configurations(size, written):
    """Whose docstrings have the true ones: `experiments/test_configs.py`."""
    unit, counts = "M", []
    for file in (ROOT / "experiments" / "configs").glob("*.py"):
        if (size != "tiny" or not file.stem.endswith(("r12", "r24"))) and (
            found := re.search(rf"\.py{written} +# ([\d.]+) ([MB])", file.read_text())
        ):
            counts.append(found[1])
            unit = found[2]
    figures = 2 if unit == "B" else 0 if size == "340m" else 1
    least, most = (f"{pick(map(float, counts)):.{figures}f} {unit}" for pick in (min, max))
    assert len(counts) > 18 and re.search(rf"^\| `:{size}`.*?\| {least} to {most} ", PAGES["README.md"], re.M), (least, most)
