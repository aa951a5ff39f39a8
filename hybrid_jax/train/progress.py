"""What a person sees of a run: a bar with the time left in a terminal, plain lines in a log file."""

import sys

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from hybrid_jax.amounts import duration, quantity


class Display:
    """Shows a run of ``steps`` steps, on the first process alone."""

    def __init__(self, steps: int, step: int):
        self.steps = steps
        self._shown = jax.process_index() == 0
        self._bar = None
        if self._shown and sys.stdout.isatty():
            whole = Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)  # however narrow the terminal is
            columns = (BarColumn(), MofNCompleteColumn(table_column=whole), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(highlight=False))
            self._task = self._bar.add_task("starting", total=steps, completed=step)
            self._bar.start()

    def step(self, step: int, row: dict, seconds_left: float, line: bool) -> None:
        """Show a step; a log file only gets those with ``line``."""
        text = f"loss {row['loss']:.4f}  {quantity(row['tokens_per_second'])} tokens/s  MFU {row['mfu']:.1%}  {duration(seconds_left)} left"
        if row["skipped"]:
            text += f"  {row['skipped']} skipped"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif line:
            width = len(str(self.steps))
            self.say(f"step {step:>{width}}/{self.steps}  {text}  gradient {row['grad_norm']:.3g}  rate {row['learning_rate']:.3g}")

    def doing(self, what: str) -> None:
        """What is under way before the first step."""
        if self._bar:
            self._bar.update(self._task, description=what)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(text, soft_wrap=True, markup=False)
        elif self._shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
