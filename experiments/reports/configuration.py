"""docs/configuration.md, written anew from the dataclasses of hybrid_jax/config and the comments beside their fields:

python -m experiments.reports.configuration
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import types
import typing
from pathlib import Path
from typing import Any, Literal

from hybrid_jax.config.mixers import MIXERS, Mixer
from hybrid_jax.config.run import RunConfig
from hybrid_jax.train.workdir import is_free

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
INTRODUCTION = """\
# Configuration

A run is a configuration: a file, `--config=configs/gla_r6.py:340m`, whose fields are set one by one, `--config.train.steps=1000`. Every
field is here, with its type and default; the files of `experiments/configs/` set some of them otherwise, by size
(`experiments/configs/recipe.py`). What a run was made with is in `config.json` in its folder; a field that is unknown, of the wrong type or
impossible beside the others is refused before anything is allocated.

Fields marked * may change when a run goes on from its checkpoints. All others are fixed once it has one, with two exceptions:
`data.source` may name another copy of the same text, and `train.steps`, `optimizer.decay_steps` and `optimizer.final_fraction` may change
until the learning rate begins to fall (`wsd`, `schedule_free`).

D is the model's width, F that inside its MLPs, T the window.

Written by `python -m experiments.reports.configuration` from the comments in `hybrid_jax/config/`.
"""


def comments(cls: type) -> dict[str, str]:
    """{field: the comment above it and the one behind it} of a dataclass, "" where there is none."""
    source = inspect.getsource(cls)
    behind, above = {}, {}  # by line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else behind)[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in above:
                first -= 1
            parts = [above[line] for line in range(first, node.lineno)] + [behind.get(node.end_lineno, "")]
            found[node.target.id] = " ".join(filter(None, parts))
    return found


def kind(hint: Any) -> str:
    """A field's type, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{_quoted(choice)}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return f"{kind(arguments[0])} or `None`"
    return "integers" if origin is tuple else f"`{hint.__name__}`"


def section(cls: type, path: str, title: str) -> str:
    """Of the dataclass at ``path`` of the configuration, and of those in it."""
    hints, said = typing.get_type_hints(cls), comments(cls)
    lines, inner = ["| field | type | default | what it is |", "|---|---|---|---|"], []
    for field in dataclasses.fields(cls):
        hint, here = hints[field.name], f"{path}.{field.name}"
        what = said[field.name]
        if hint is Mixer:
            headings = {name: f"`{here}` of `{name}`" for name in MIXERS} | {"attention": f"`{path}.attention`"}
            type_name = ", ".join(_link(f"`{name}`", heading) for name, heading in headings.items())
            default = f"`{field.default_factory.name}`"
            inner += [section(option, here, headings[name]) for name, option in MIXERS.items() if name != "attention"]
        elif dataclasses.is_dataclass(hint):
            type_name, default = _link("its own fields", f"`{here}`"), ""
            inner.append(section(hint, here, f"`{here}`"))
            what = what or inspect.getdoc(hint).splitlines()[0]
        else:
            type_name, default = kind(hint), f"`{_quoted(field.default)}`"
        mark = "*" if is_free(here.removeprefix("config.")) else ""
        lines.append(f"| `{field.name}`{mark} | {type_name} | {default} | {what.replace('|', chr(92) + '|')} |")
    return "\n\n".join([f"## {title}", inspect.getdoc(cls), "\n".join(lines), *inner]).replace("``", "`")


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _link(text: str, heading: str) -> str:
    """To a heading, by the anchor that GitHub makes of it."""
    return f"[{text}](#{re.sub(r'[^a-z0-9_ -]', '', heading.lower()).replace(' ', '-')})"


def page() -> str:
    return f"{INTRODUCTION}\n{section(RunConfig, 'config', '`config`')}\n"


if __name__ == "__main__":
    PAGE.write_text(page())
