"""Results as a table."""

from typing import Any

from rich.table import Table


def results_table(title: str, results: dict[str, Any]) -> Table:
    """The scores of `evaluate` and the study's groups, in percent: a column for each length, and what each task is made of."""
    lengths = [str(length) for length in results["settings"]["lengths"]]
    table = Table(title=title, title_style="bold")
    table.add_column("task")
    for length in lengths:
        table.add_column(f"{int(length):,}", justify="right")
    table.add_column("made of")
    for task, by_length in results["scores"].items():
        table.add_row(task, *(f"{by_length[length]['score']:.1%}" for length in lengths), by_length[lengths[0]]["source"])
    table.add_section()
    for group in results["groups"][lengths[0]]:
        table.add_row(group, *(f"{results['groups'][length][group]:.1%}" for length in lengths), "")
    return table
