"""The tables of rows in docs/, written anew from experiments/results/:

    python -m experiments.benchmarks.tables

Each stands in its page between the lines ``<!-- table NAME -->`` and ``<!-- end -->`` and has the newest row of each case.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.benchmarks.cases import OPERATORS, PASSES
from experiments.benchmarks.results import newest
from experiments.compiled.targets import GPUS, TPUS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments/results"
PAGES = (ROOT / "docs/tpu.md", ROOT / "docs/gpu.md")


def markdown(heading: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heading, *cells = ("| " + " | ".join(line) + " |" for line in (heading, *lines))
    return "\n".join([heading, re.sub(r"[^|]+", "---", heading), *cells])


def unsure(row: dict) -> str:
    """A mark for numbers that count a loop once whose trips are not known."""
    return "?" if row["unknown_loops"] else ""


def tpu_operators() -> str:
    """A shape and pass a line: bundles a token and head of the kernel and of XLA's form on each generation, from the least to the most."""
    key = ("operator", "shape", "pass", "target", "implementation")
    rows = {tuple(row[part] for part in key): row for row in newest(RESULTS / "tpu_static.jsonl", "tpu_static")}
    cases = sorted({case[:2] for case in rows}, key=lambda case: (OPERATORS.index(case[0]), case[1]))

    def line(operator, shape, pass_name):
        def bundles(target, implementation):
            row = rows.get((operator, shape, pass_name, target, implementation))
            if row is None:
                return ""
            least = row["bundles_per_token_and_head"]
            most = least * row.get("bundles_most", row["bundles"]) / row["bundles"]
            return f"{least:.2f}{unsure(row)}" + (f" to {most:.2f}" if most > 1.005 * least else "")

        def cell(target):
            kernel, xla = bundles(target, "pallas"), bundles(target, "xla")
            return f"{kernel} ({xla})" if xla else kernel

        timed = rows.get((operator, shape, pass_name, "tpu:v6e", "pallas"))
        times = f"{timed['bundle_s'] * 1e6:.0f}, {timed['hbm_s'] * 1e6:.0f}" if timed else ""
        return [f"`{operator}` {shape}", pass_name.replace("_", " + "), *map(cell, TPUS), times]

    heading = ["operator, shape", "pass", *(target.removeprefix("tpu:") for target in TPUS), "v6e: µs of bundles, of HBM"]
    return markdown(heading, (line(*case, pass_name) for case in cases for pass_name in PASSES))


def tpu_steps() -> str:
    """GB that a device holds, a configuration a line and a generation a column."""
    rows = {(row["config"], row["target"]): row for row in newest(RESULTS / "tpu_static.jsonl", "tpu_step")}
    configs = sorted({config for config, _ in rows}, key=lambda config: (config.endswith(":1b3"), config))

    def held(config, target):
        return f"{rows[config, target]['held_bytes'] / 1e9:.1f}" if (config, target) in rows else ""

    lines = ([f"`{config}`", *(held(config, target) for target in TPUS)] for config in configs)
    return markdown(["", *(target.removeprefix("tpu:") for target in TPUS)], lines)


def gpu_operators() -> str:
    """A shape and length a line, forward + backward: the kernels' bytes and floors beside XLA's form."""
    rows = [row for row in newest(RESULTS / "gpu_static.jsonl", "gpu_static") if row["pass"] == "forward_backward"]
    rows.sort(key=lambda row: (OPERATORS.index(row["operator"]), row["shape"].split()[0], row["sizes"]["T"]))
    of_xla = {(row["operator"], row["shape"]): row for row in rows if row["implementation"] == "xla"}

    def line(row):
        xla = of_xla.get((row["operator"], row["shape"]))
        name, T = f"`{row['operator']}` {row['shape'].split()[0]}", f"{row['sizes']['T']:,}"
        floors = [f"{row[f'{name}_s'] * 1e6:,.0f}" for name in ("hbm", "flops", "issue", "stalls")]
        floors[2:] = (cell + "?" * any(kernel["unknown_loops"] for kernel in row["kernels"]) for cell in floors[2:])
        return [name, T, megabytes(row), *floors, row["bound"], mebibytes(row), *([megabytes(xla), mebibytes(xla)] if xla else ["", ""])]

    def megabytes(row):
        return f"{row['hbm_bytes'] / 1e6:,.0f}{unsure(row)}"

    def mebibytes(row):
        return f"{row['temp_bytes'] / 2**20:,.0f}"

    heading = ["operator, shape", "T", "MB", "HBM µs", "FLOPs µs", "issue µs", "stalls µs", "bound", "temporary MiB"]
    return markdown([*heading, "XLA's form: MB", "temporary MiB"], (line(row) for row in rows if row["implementation"] == "pallas"))


def gpu_kernels() -> str:
    """A kernel a line: what the compiler made of it, over all shapes."""
    found: dict[str, list[dict]] = {}
    rows = sorted(newest(RESULTS / "gpu_static.jsonl", "gpu_static"), key=lambda row: OPERATORS.index(row["operator"]))
    for row in rows:
        for kernel in row["kernels"]:
            found.setdefault(kernel["name"], []).append(kernel)

    def span(kernels, fact):
        values = sorted({kernel[fact] or 0 for kernel in kernels})
        return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"

    facts = ("registers", "spill_bytes", "smem_bytes", "ctas_per_sm")
    lines = ([f"`{name}`", *(span(kernels, fact) for fact in facts)] for name, kernels in found.items())
    return markdown(["kernel", "registers", "spilled bytes", "shared memory, bytes", "CTAs an SM"], lines)


def gpu_steps() -> str:
    """A configuration and window a line: what a step of 32k tokens holds and moves, which kernels it runs, and what share of its time the
    model's FLOPs are where both go at the datasheet's rates, one after the other.
    """
    rows = newest(RESULTS / "gpu_static.jsonl", "gpu_step_static")
    rows.sort(key=lambda row: (row["config"].endswith(":1b3"), not row["config"].startswith("transformer"), row["config"], row["window"]))

    def line(row):
        operators = {operator: "+".join(names) for layer in row["implementations"].values() for operator, names in layer.items()}
        used = ", ".join(f"{operator} {names}" for operator, names in sorted(operators.items()))
        held, moved = f"{row['held_bytes'] / 1e9:.1f}", f"{row['hbm_bytes'] / 1e9:.0f}"
        spilled = sum(kernel["spill_bytes"] for kernel in row["kernels"].values())
        card = GPUS[row["target"]].chip
        computing, moving = row["flops"] / card.flop_per_s, row["hbm_bytes"] / card.bytes_per_s
        times = f"{computing * 1e3:.0f}", f"{moving * 1e3:.0f}", f"{computing / (computing + moving):.0%}"
        return [f"`{row['config']}`", f"{row['window']:,}", used, f"`{row['remat']}`", held, moved, *times, str(spilled)]

    headings = ["step", "T", "kernels", "remat", "holds GB", "HBM GB", "FLOPs ms", "HBM ms", "MFU, in turn", "spilled bytes"]
    return markdown(headings, map(line, rows))


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (tpu_operators, tpu_steps, gpu_operators, gpu_kernels, gpu_steps)}


def written(page: str) -> str:
    """The text of a page with its tables as the rows are now. Raises KeyError for a table that does not exist."""
    places = re.compile(r"(<!-- table (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
    return places.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text()))
        print(f"{path.relative_to(ROOT)}: {', '.join(re.findall('<!-- table (.+) -->', path.read_text()))}")
