"""What the pages say can be typed, opened and read: every command's flags and configuration, every link, every file's name.

`test_readme.py` runs the README's commands, `launch/test_docs.py` those of the launchers.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from experiments import cli
from hybrid_jax import costs
from launch import command_flags

ROOT = Path(__file__).parent.parent
A_READERS = {"rg_lru.py", "my_model.py"}  # files of docs/extending.md, for which test_extending.py is
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMAND = re.compile(r"python -m ((?:experiments|launch)\.\w+\b)(?!\.\w)((?:\\\n|[^`\n])*)")


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


def words(text: str) -> list[str]:
    """The flags that a command is shown with, but for those of which a part is left out."""
    return [word for word in shlex.split(text, comments=True) if word.startswith("--") and "..." not in word]


def of_a_task(word: str) -> str:
    """With numbers for what an array of tasks, or a shell, puts into it."""
    return re.sub(r"\{task\}|\$\w+", "0", word.replace("{tasks}", "64"))


@pytest.mark.parametrize("module", sorted({module for _, module, _ in COMMANDS}))
def test_commands_take_the_flags_that_they_are_shown_with(module):
    shown = [(page, words(text)) for page, of, text in COMMANDS if of == module]
    said = command_flags.mistakes(module, *(tuple(map(of_a_task, given)) for _, given in shown))
    assert not [(page, wrong) for (page, _), wrong in zip(shown, said, strict=True) if wrong]
    for _, given in shown:
        if any(word.startswith("--config=") and word.removeprefix("--config=") not in A_READERS for word in given):
            cli.load_run([word for word in given if re.match(r"--config[.=]", word)], "")


NAMES = {"HGRN": "hgrn", "HGRN2": "hgrn2", "RetNet": "retnet", "GLA": "gla", "DeltaNet": "delta_net", "Gated DeltaNet": "gated_delta_net"}


def test_the_readmes_table_says_what_its_rows_say():
    """Every row of the file is in the table, and was made as the command above it would make it."""
    file = ROOT / "experiments/results/tiny_50_steps.jsonl"
    command, table = re.search(rf"\n(python [^`]*{file.name})\n```\n\n(.*?)\n\n", PAGES["README.md"], re.S).groups()
    cells = {}
    for line in table.splitlines()[2:]:
        name, *figures = line.strip("| ").split(" | ")
        cells |= {f"{NAMES[name]}_{ratio}-tiny": figure for ratio, figure in zip(("pure", "r24", "r12", "r6", "r3"), figures, strict=True)}
    cells["transformer-tiny"] = re.search(r"\(the Transformer: ([\d.]+)\)", PAGES["README.md"])[1]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["run"]: f"{row['evaluation']['bits_per_byte']:.2f}" for row in rows} == cells and len(rows) == 31
    overrides = [word for word in shlex.split(command) if word.startswith("--config.")]
    for row in rows:
        config = cli.load_run([f"--config=configs/{row['run'].removesuffix('-tiny')}.py:tiny", *overrides]).config
        tokens = config.train.steps * config.train.batch * config.data.window
        made = (config.train.steps, tokens, config.evaluation.tokens, costs.parameters(config.model), 0)
        assert made == (row["step"], row["tokens"], row["evaluation"]["tokens"], row["parameters"], row["skipped"]), row["run"]


def test_the_readmes_tiny_run_came_to_what_its_summary_says():
    (told,) = re.findall(r"\n(?:.+\n)*.*gla_r6_tiny\.json(?:.*\n)+", PAGES["README.md"])
    found = json.loads((ROOT / "experiments/results/gla_r6_tiny.json").read_text())
    scores = found["evaluation"]
    bits = [f"{scores[name]:.2f}" for name in ("bits_per_byte", "xz_bits_per_byte", "unigram_bits_per_byte")]
    figures = [str(found["step"]), f"{found['tokens_per_second'] / 1000:.1f}k", *bits, f"{100 * scores['mqar_accuracy']:.1f} %"]
    assert not [figure for figure in figures if figure not in told]


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
    alone = set(re.findall(r"`(\w+\.py)`", PAGES[page])) - A_READERS
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
