"""The rows of --target as a picture: the recurrences' kernels against XLA at each shape of one TPU generation.

Attention is left out: a schedule does not know how many blocks it visits.
"""

from pathlib import Path

from experiments.benchmarks.results import newest
from hybrid_jax.figure import INK, subplots

COLORS = {"xla": "#C3CAD5", "pallas": "#2F6DB5"}
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


def recurrences(file: Path, target: str) -> list[dict]:
    """The rows that are drawn."""
    return [row for row in newest(file, "tpu_static") if row["target"] == target and row["operator"] != "attention"]


def plot(file: Path, target: str) -> Path:
    """Draw what ``file`` has of a target beside it; the picture."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    rows = recurrences(file, target)
    shapes = sorted({(row["operator"], row["shape"]) for row in rows if row["implementation"] == "pallas"})
    picture = file.with_name(f"{file.stem}_{target.removeprefix('tpu:')}.png")
    size, style = (12, 1.2 + 0.36 * len(shapes)), {"font.size": 9, "axes.axisbelow": True}
    with subplots(picture, 1, 2, size=size, style=style, sharey=True) as (figure, panels):
        for axes, (pass_name, title) in zip(panels, PASSES.items(), strict=True):
            for row in rows:
                if row["pass"] == pass_name and (row["operator"], row["shape"]) in shapes:
                    _bar(axes, shapes.index((row["operator"], row["shape"])), row)
            axes.grid(axis="y", visible=False)
            axes.set_title(title)
            axes.set_xlabel("ns a token and head (linear_scan, causal_conv: and 128 channels)")
        panels[0].set_yticks(range(len(shapes)), [f"{operator}  {shape}" for operator, shape in shapes])
        panels[0].invert_yaxis()
        handles = [Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in COLORS.items()]
        handles.append(Line2D([], [], color=INK, marker="|", ls="", ms=10, label="the pallas row's HBM traffic alone"))
        handles.insert(2, Line2D([], [], color=COLORS["pallas"], lw=2, label="to where no decays are near"))
        panels[1].legend(handles=handles, loc="lower right")
        figure.suptitle(f"{target.removeprefix('tpu:')}, bfloat16, by the compiler's schedule", x=0.01, ha="left", fontsize=9)
    return picture


def _bar(axes, place: int, row: dict) -> None:
    """A shape's bar of one implementation, the longer of its bundles' time and its HBM traffic's; a line on to that of dearer branches."""
    work = row["bundles"] / row["bundles_per_token_and_head"]
    is_kernel = row["implementation"] == "pallas"
    most = row["bundle_s"] * row.get("bundles_most", row["bundles"]) / row["bundles"]
    y = place + (0.2 if is_kernel else -0.2)
    length, longest = (1e9 * max(seconds, row["hbm_s"]) / work for seconds in (row["bundle_s"], most))
    axes.barh(y, length, height=0.36, color=COLORS[row["implementation"]])
    at_least = "≥ " if row["unknown_loops"] else ""
    if longest > length:
        axes.plot([length, longest], [y, y], color=COLORS[row["implementation"]], lw=2)
    axes.annotate(f"{at_least}{length:.2f}", (longest, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    if is_kernel:
        axes.plot(1e9 * row["hbm_s"] / work, y, color=INK, marker="|", ms=8)
