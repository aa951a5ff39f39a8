"""Pictures in one style, written as PNGs: without a display, and without a word to the Matplotlib of a notebook that draws its own."""

import contextlib
import io
from collections.abc import Iterator

from etils import epath

INK, REFERENCE = "#333333", "#8A8A8A"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#BBBBBB",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#EEEEEE",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.color": INK,
}


@contextlib.contextmanager
def subplots(file: epath.PathLike, *shape: int, size: tuple[float, float], style: dict | None = None, **keywords) -> Iterator[tuple]:
    """(a figure of ``size`` in inches, its axes, as ``Figure.subplots`` makes them) to draw on; at the end it is written to ``file``.

    style: Matplotlib's settings beside those of :data:`STYLE`, or in their place.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | (style or {})):
        figure = Figure(size, layout="constrained")
        yield figure, figure.subplots(*shape, **keywords)
        picture = io.BytesIO()  # as Matplotlib cannot write into a bucket
        figure.savefig(picture, format="png", dpi=150)
    epath.Path(file).write_bytes(picture.getvalue())
