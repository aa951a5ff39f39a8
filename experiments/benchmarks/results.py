"""Files of rows, a line of JSON each. Of a run that was killed while it wrote, the last line may be a part of one, which counts as none."""

import json
import os
from pathlib import Path

CASE = ("target", "operator", "shape", "config", "window", "implementation", "pass")  # what a row is of, as far as it has it


def read(file: Path) -> list[dict]:
    """The rows of a file, none where there is none, in order; what was cut short is left out, as is what followed it on its line."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def newest(file: Path, suite: str) -> list[dict]:
    """Of a suite's rows, the last of each case that is no failure, bfloat16 where it has a dtype."""
    found = {}
    for row in sorted(read(file), key=lambda row: row["time"]):
        if row["suite"] == suite and "failure" not in row and row.get("dtype", "bfloat16") == "bfloat16":
            case = tuple(row.get(part) for part in CASE)
            found.pop(case, None)
            found[case] = row
    return list(found.values())


def append(row: dict, file: Path) -> dict:
    """The row, written as a line of a file: one of its own, where the last was cut short."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as lines:
        if size := lines.seek(0, os.SEEK_END):
            lines.seek(size - 1)
        cut_short = lines.read() not in (b"", b"\n")
        lines.write(b"\n" * cut_short + json.dumps(row).encode() + b"\n")
    return row
