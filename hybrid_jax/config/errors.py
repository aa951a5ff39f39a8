"""What is raised for a configuration that cannot be run, and said of a name that does not exist."""

import difflib
from collections.abc import Collection


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, what it got and what it needs."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def divides(part: int, whole: int, message: str) -> None:
    need(part >= 1 and whole % part == 0, message)


def meant(name: str, known: Collection[str], otherwise: str | None = None, *, form: str = "{}", most: int = 3) -> str:
    """What to say to one who asked for ``name``: up to ``most`` that are written like it, each in ``form``, as "did you mean a or b?".

    otherwise: what to say where there are none; by default all of ``known``.
    """
    if close := difflib.get_close_matches(name, known, n=most):
        return f"did you mean {' or '.join(map(form.format, close))}?"
    return otherwise or f"there are {', '.join(map(form.format, known)) or 'none'}"
