"""What is known of a training step on a pod that is not rented, for a person to read."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_jax.amounts import count
from hybrid_jax.chips import GPU_SHARE
from hybrid_jax.config import RunConfig
from hybrid_jax.train import advice
from launch import ahead
from launch.candidates import Candidate, Found
from launch.topologies import Hosts, Target

NEAR = 0.1  # of a device's HBM: closer to its end, the least effort's memory does not say whether a run fits


class Case(NamedTuple):
    """A run's step on a target."""

    name: str  # of the configuration
    config: RunConfig
    target: Target

    @property
    def identity(self) -> dict[str, Any]:
        return {"config": self.name} | ahead.identity(self.config, self.target)


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=100)


def gb(bytes: float) -> str:
    """Gigabytes to three figures, without their unit: for a column of them."""
    return f"{bytes / 1e9:.3g}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds >= 1e-3 else f"{1e3 * seconds:.2g}"


def mesh_text(shape: dict[str, int]) -> str:
    """Its axes of more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"


def one(case: Case, measure: Callable[[Case], dict]) -> int:
    """Compile a run's step and say what is known of it; the exit code."""
    shown = console()
    shown.print(_what(case), soft_wrap=True)
    with shown.status("compiling"):
        row = measure(case)
    if "failure" in row:
        shown.print(f"it could not be compiled: {row['failure']}", markup=False)
        return 1
    if "no_room" in row:
        shown.print(_effort(row), _verdict(row, case.target), sep="\n")
        return 1
    for table in (_held(row, case.target), _collectives(row), _bound(row)):
        shown.print(table)
    shown.print(advice.implementations(case.config.model, row["implementations"]), _effort(row), _verdict(row, case.target), sep="\n")
    return 0


def _what(case: Case) -> str:
    config, target, shape = case.config, case.target, case.identity["mesh"]
    batch, window, remat = config.train.batch, config.data.window, config.model.remat
    slices = f"{target.slices} x " if target.slices > 1 else ""
    rows = batch // (shape["data"] * shape["fsdp"])
    return (
        f"{case.name} on {slices}{target.name}, {count(target.chips, 'chip')}, "
        f"mesh {mesh_text(shape)}: a step of {batch} x {window} tokens, "
        f"{count(rows, 'sequence')} a device, {min(rows, config.train.microbatch)} at once, remat {remat}"
    )


def _effort(row: dict) -> str:
    if row["effort"] == ahead.QUICK:
        return f"compiled in {row['compile_s']:.0f} s with the least effort: what a run holds and moves is known with --effort=full"
    return f"compiled in {row['compile_s']:.0f} s, as a run is"


def _verdict(row: dict, target: Target) -> str:
    if "no_room" in row:
        needed, room = row["no_room"]
        return f"IT DOES NOT FIT: a device needs {gb(needed)} GB and has {gb(room)} for it"
    used, fits = row["held_bytes"] / ahead.capacity(target), "it fits"
    if row["effort"] == ahead.QUICK and used > 1 - NEAR:
        fits += ", but only just: make sure with --effort=full"
    if isinstance(target, Hosts) and used > GPU_SHARE:
        fits += f", but only with more than the {GPU_SHARE:.0%} of a GPU's memory that training takes unless XLA_CLIENT_MEM_FRACTION is set"
    return f"{fits}; a step takes {milliseconds(row['step_s'])} ms at least, the model {row['mfu']:.0%} of the chips' FLOP/s at most"


def _held(row: dict, target: Target) -> Table:
    table = Table("a device holds", "GB", "of its HBM")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, bytes in (*row["held"].items(), ("all", row["held_bytes"])):
        if not bytes:  # a program for GPUs is not part of what XLA counts
            continue
        table.add_row(kind, gb(bytes), f"{bytes / ahead.capacity(target):.1%}")
    return table


def _collectives(row: dict) -> Table:
    table = Table("collective", "along", "times a step", "GB a device sends")
    for column in table.columns[2:]:
        column.justify = "right"
    for found in row["collectives"]:
        table.add_row(found["kind"], ", ".join(found["axes"]), f"{found['count']:,}", gb(found["bytes"]))
    return table


def _bound(row: dict) -> Table:
    known = " (state only)" if row["effort"] == ahead.QUICK else ""
    amounts = {
        "FLOPs": f"{row['flops'] / 1e12:.3g} TFLOP, the model's own {row['model_flops'] / 1e12:.3g}",
        "HBM": f"{gb(row['hbm_bytes'])} GB{known}",
    }
    table = Table("a step takes at least", "of a device", "ms")
    table.columns[2].justify = "right"
    for name, seconds in row["seconds"].items():
        table.add_row(name if name in amounts else f"sending along {name}", amounts.get(name, ""), milliseconds(seconds))
    return table


# ---------------------------------------------------------------- a sweep


def announce(found: Found, target: Target, most: int) -> None:
    """Say how much there is to try, before any of it is compiled."""
    total = len(found.likely) + len(found.too_large)
    console().print(
        f"{total} ways to run it on {target.name}; {len(found.too_large)} hold more than {gb(ahead.capacity(target))} GB by "
        f"their state and block inputs alone; at most {most} of the other {len(found.likely)} are compiled. "
        f"{found.impossible} meshes do not divide the model or the batch",
        soft_wrap=True,
    )


def sweep(name: str, found: Found, target: Target, most: int, measure: Callable[[Case], dict]) -> int:
    """Compile the likeliest, rank those that fit; the exit code."""
    shown, done, left_out = console(), [], 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown, disable=not shown.is_terminal) as progress:
        task = progress.add_task("compiling", total=min(most, len(found.likely)))
        for candidate in found.likely:
            if len(done) == most:
                break
            if any("no_room" in row and candidate.holds_more(other) for other, row in done):
                left_out += 1
                continue
            done.append((candidate, measure(Case(name, candidate.config, target))))
            progress.advance(task)
    shown.print(_ranking(done))
    rest = len(found.likely) - len(done) - left_out
    shown.print(f"left out: {left_out} that hold more than one that does not fit, {rest} less likely ones (--compiles)")
    fitting = [row for _, row in done if "step_s" in row]
    if not fitting:
        shown.print("NONE OF THEM FITS")
        return 1
    shown.print(_effort(min(fitting, key=lambda row: row["step_s"])))
    return 0


def _ranking(done: list[tuple[Candidate, dict]]) -> Table:
    table = Table("mesh", "remat", "at once", "GB held", "ms at least", "MFU at most", "bound by")
    for column in table.columns[2:6]:
        column.justify = "right"
    for _, row in sorted(done, key=lambda pair: pair[1].get("step_s", float("inf"))):
        what = [mesh_text(row["mesh"]), row["remat"], str(row["microbatch"])]
        if "step_s" in row:
            bound = max(row["seconds"], key=row["seconds"].get)
            table.add_row(*what, gb(row["held_bytes"]), milliseconds(row["step_s"]), f"{row['mfu']:.0%}", bound)
        elif "no_room" in row:
            needed, room = row["no_room"]
            table.add_row(*what, gb(needed), "", "", f"does not fit in {gb(room)}")
        else:
            table.add_row(*what, "", "", "", f"failed: {row['failure'][:60]}")
    return table
