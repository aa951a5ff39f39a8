"""The end of a run: what it came to, as a table, as summary.json, and as the commands that come next."""

import json
import platform
import resource
import sys
from importlib.metadata import version
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.table import Table

from hybrid_jax import costs
from hybrid_jax.amounts import count, duration, gigabytes, quantity
from hybrid_jax.config import RunConfig
from hybrid_jax.storage import write_whole
from hybrid_jax.train.plot import plot_run
from hybrid_jax.train.workdir import evaluation_file, saved_steps

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def finish(name: str, config: RunConfig, workdir: epath.Path, speed: dict[str, Any], revision: str) -> int:
    """Write summary.json and summary.png of a run that came to its end, and show it.

    speed: what training measured of itself. revision: of the code that trained it.
    """
    if jax.process_index():  # the first process does, from what it wrote
        return 0
    steps = config.train.steps
    evaluation = json.loads(evaluation_file(workdir, steps).read_text())
    summary = {
        "run": name,
        "step": steps,
        "parameters": costs.parameters(config.model),
        "tokens": steps * config.train.batch * config.data.window,
        "evaluation": {key: value for key, value in evaluation.items() if key not in ("step", "loss_by_position")},
        **speed,
        "peak_memory_bytes": peak_memory(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "git": revision,
    }
    plot_run(workdir, name)
    write_whole(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    show(summary, workdir, config)
    return 0


def show_again(workdir: epath.Path, config: RunConfig) -> int:
    """Show the summary of a run that ended before."""
    if jax.process_index() == 0:
        show(json.loads((workdir / "summary.json").read_text()), workdir, config)
    return 0


def peak_memory() -> int:
    """Bytes at the worst moment so far: of the first device where it counts them, of this process on CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # kilobytes elsewhere


def show(summary: dict[str, Any], workdir: epath.Path, config: RunConfig) -> None:
    """Print a summary as a table, and what to type next."""
    table = Table(title=f"{summary['run']} after {count(summary['step'], 'step')}", show_header=False, title_style="bold")
    table.add_row("parameters", f"{summary['parameters']:,}")
    table.add_row("trained on", f"{quantity(summary['tokens'])} tokens, {duration(summary['seconds'])} since it was last started")
    for row in evaluation_rows(summary["evaluation"]):
        table.add_row(*row)
    table.add_row("speed", f"{quantity(summary['tokens_per_second'])} tokens/s, MFU {summary['mfu']:.1%} of {summary['peak']}")
    table.add_row("steps skipped", str(summary["skipped"]))
    table.add_row("peak memory", gigabytes(summary["peak_memory_bytes"]))
    table.add_row("device", summary["device"])
    table.add_row("picture", str(workdir / "summary.png"))
    print_table(table)
    prompt = "def " if config.data.source == "stdlib" else "The"
    print(f"to let it write:       python -m experiments.generate --workdir={workdir} --prompt='{prompt}' --temperature=0.8 --top_p=0.95")
    print(f"to evaluate it again:  python -m experiments.eval --workdir={workdir}")
    print(f"to train longer:       {_longer(workdir, config)}")
    if (workdir / "profile").exists():
        print(f"to look at its trace:  tensorboard --logdir={workdir}, under Profile (pip install tensorboard xprof)")


def _longer(workdir: epath.Path, config: RunConfig) -> str:
    """How a run that has ended is trained for more steps: from where its learning rate was the same as in a longer one."""
    opened = config.open_steps
    if opened == config.train.steps:
        return "the same command with more --config.train.steps"
    if opened and opened in saved_steps(workdir):
        parts = ("config.json", "text.sha256", "huggingface", f"checkpoints/{opened}")
        copied = ", ".join(part for part in parts if (workdir / part).exists())
        return (
            f"copy {copied} (of before the learning rate's fall) to the same places in a new folder, NEW; "
            "then the same command with --workdir=NEW and more --config.train.steps"
        )
    return (
        f"python -m experiments.convert --from_run={workdir} --workdir=NEW, then the same command with --workdir=NEW: "
        "a new run, that begins with this one's parameters"
    )


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """An evaluation as (name, value) for a table."""
    rows = [
        ("held-out loss", f"{evaluation['loss']:.4f} nats a token, over {evaluation['tokens']:,} tokens"),
        ("bits per byte", f"{evaluation['bits_per_byte']:.4f}"),
        ("  of the same bytes", f"xz -9: {evaluation['xz_bits_per_byte']:.4f}, unigram: {evaluation['unigram_bits_per_byte']:.4f}"),
    ]
    for name, part in evaluation.get("parts", {}).items():
        rows.append((f"  {name}", f"{part['loss']:.4f} nats a token, {part['bits_per_byte']:.4f} bits per byte"))
    if "mqar_accuracy" in evaluation:
        rows.append(("recall (MQAR)", f"{evaluation['mqar_accuracy']:.1%} right, loss {evaluation['mqar_loss']:.4f}"))
    return rows


def show_evaluation(title: str, evaluation: dict[str, Any]) -> None:
    """Print an evaluation, and its loss by position in a few places of the window."""
    table = Table(title=title, show_header=False, title_style="bold")
    for row in evaluation_rows(evaluation):
        table.add_row(*row)
    losses = evaluation["loss_by_position"]
    places = [2**i - 1 for i in range(len(losses).bit_length()) if 2**i <= len(losses)]
    shown = ", ".join(f"{place + 1}: {losses[place]:.2f}" for place in places if losses[place] is not None)
    table.add_row("loss at the n-th token", shown)
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table, as wide as the terminal is, or 120 columns elsewhere."""
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
