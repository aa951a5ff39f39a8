"""Rows: measured one after the other, printed, appended as lines of JSON, each with what its numbers depend on."""

import functools
import importlib
import os
import platform
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.benchmarks import fla_peer, results
from experiments.benchmarks.cases import Case
from experiments.revision import revision


class Suite(NamedTuple):
    """What is measured: which cases a selected one stands for, their row, what a table shows of it, and a picture, if there is one.

    A case says what it is by ``str`` and, for the row, by its ``identity``; ``about`` is what all rows of the suite are of, failed ones
    included. ``draw`` takes the rows and the file that they are in. Where there is ``until``, by ``time.monotonic``, no row is begun after
    it, and what the file has of this very code is not measured again: the same command goes on where it was. ``rehearse`` takes the cases
    that are to be measured, before the first of them is.
    """

    name: str
    cases: Callable[[Case], Iterable[Case]]
    measure: Callable[[Case], dict]
    columns: dict[str, Callable[[dict], str]]  # heading -> text of a row
    draw: Callable[[list[dict], Path], Path] | None = None
    about: dict = {}
    until: float | None = None
    rehearse: Callable[[list[Case]], None] | None = None


@functools.cache
def provenance() -> dict:
    """What a row's numbers depend on beside the case: device, versions, revision."""
    device = jax.devices()[0]
    return {
        "device": f"{_cpu_model()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.import_module("jaxlib").__version__,
        "git": revision(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(name: str, run: Callable[[Case], dict], case: Case, about: dict | None = None) -> dict:
    """The whole row of a case in the suite ``name``: what ``run`` gives, or the message as its failure where that raises."""
    row = {"suite": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), **provenance()}
    row |= case.identity | (about or {})
    try:
        return row | run(case)
    except Exception as error:  # refused arguments, failed compilations, no memory left, a mistake: it costs this row alone
        return row | {"failure": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}


def table(suite: Suite, cases: list[Case], rows: list[dict]) -> Table:
    identity = [name for name in cases[0].identity if name != "sizes"]
    table = Table(*identity, *suite.columns)
    for row in rows:
        cells = ["failed"] if "failure" in row else [text(row) for text in suite.columns.values()]
        table.add_row(*(str(row[name]) for name in identity), *cells)
    return table


def unmeasured(cases: list[Case], suite: Suite, output: Path) -> list[Case]:
    """The cases that a file has no row of, measured on this device at this revision with what is installed now."""
    here = {"suite": suite.name} | {name: provenance()[name] for name in ("device", "git", "jax", "jaxlib")}
    peers = fla_peer.installed()  # of which the rows of our own say nothing
    rows = [row for row in results.read(output) if "failure" not in row and here.items() <= row.items()]
    done = [row for row in rows if row.get("peer_versions", peers) == peers]
    return [case for case in cases if not any(case.identity.items() <= row.items() for row in done)]


def run(cases: list[Case], suite: Suite, output: Path) -> list[dict]:
    """Measure the cases one after the other, a line printed and a row appended for each."""
    if suite.until is not None:
        cases = unmeasured(cases, suite, output)
    if not cases:
        return []
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log has no width to fit
    if suite.rehearse:
        suite.rehearse(cases)
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for number, case in enumerate(cases, 1):
            if suite.until is not None and time.monotonic() > suite.until:
                console.print(f"the time is over: {len(cases) - len(rows)} are left for the same command, given again")
                break
            progress.update(task, description=str(case))
            row = results.append(measure(suite.name, suite.measure, case, suite.about), output)
            rows.append(row)
            progress.advance(task)
            figures = row.get("failure") or ", ".join(f"{name} {text(row)}" for name, text in suite.columns.items())
            console.print(f"{number}/{len(cases)} {case}: {figures}", markup=False, highlight=False, soft_wrap=True)
    console.print(table(suite, cases, rows))
    return rows
