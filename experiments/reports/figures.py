"""The study's figures from any runs: every measure by ratio, RULER by group, and recall against what it costs."""

import zlib
from pathlib import Path

from experiments.reports import published
from experiments.reports.collect import RATIOS, Score
from experiments.reports.tables import BY_RATIO, Measure, Models, place, title
from hybrid_jax.figure import INK, REFERENCE, subplots

COLORS = {
    "hgrn": "#B279A2",
    "hgrn2": "#54A24B",
    "retnet": "#9D755D",
    "gla": "#4C78A8",
    "delta_net": "#F58518",
    "gated_delta_net": "#E45756",
    "kda": "#72B7B2",
    "attention": INK,
}
MARKERS = dict(zip(RATIOS, "ov^sD*", strict=True))


def color(family: str) -> str:
    """The family's own, in every figure."""
    return COLORS.get(family) or f"C{zlib.crc32(family.encode()) % 10}"


def by_ratio(models: Models, size: str, file: Path) -> Path | None:
    """A panel a measure: ratio across, a line a family, its seeds and their spread, the Transformer as a level. None without any."""
    found = {key[1:]: scores for key, scores in models.items() if key[0] == size}
    measures = [m for m in BY_RATIO if m.name != "loss" and any(m.name in scores for scores in found.values())]
    if not measures:
        return None

    with subplots(file, 1, len(measures), size=(5.2 * len(measures), 4.4), squeeze=False) as (figure, panels):
        for axes, measure in zip(panels[0], measures, strict=True):
            _ratio_panel(axes, found, {m: s[measure.name] for m, s in found.items() if measure.name in s}, measure)
            _studys_lines(axes, found, measure, size)
            _within_percents(axes, measure)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return file


def _ratio_panel(axes, found: dict, scores: dict[tuple[str, str], Score], measure: Measure) -> None:
    ratios = [ratio for ratio in RATIOS if ratio != "full" and any(model[1] == ratio for model in found)]
    scale = 100 if measure.percent else 1
    families = sorted({family for family, _ in found}, key=place)
    for n, family in enumerate(families):
        beside = 0.05 * (n - len(families) / 2)  # so that error bars do not lie on each other
        points = [(i + beside, scores[family, ratio]) for i, ratio in enumerate(ratios) if (family, ratio) in scores]
        if points:
            places, means = [i for i, _ in points], [scale * score.mean for _, score in points]
            errors = [scale * (score.spread or 0) for _, score in points]
            style = {"color": color(family), "label": title(family), "markersize": 5, "linewidth": 1.8, "capsize": 3}
            axes.errorbar(places, means, errors, fmt="o-", **style)
            for i, score in points:
                axes.plot([i] * len(score.values), [scale * x for x in score.values], ".", color=color(family), alpha=0.35, markersize=9)
    if score := scores.get(("attention", "full")):
        axes.axhline(scale * score.mean, color=color("attention"), linestyle="--", linewidth=1.2, label=title("attention"))
        spread = scale * (score.spread or 0)
        axes.axhspan(scale * score.mean - spread, scale * score.mean + spread, color=color("attention"), alpha=0.08, linewidth=0)
    axes.set(title=measure.heading, xlabel="linear layers to one of full attention")
    axes.set_xticks(range(len(ratios)), ratios)
    axes.set_xlim(-0.4, len(ratios) - 0.6)
    if not measure.percent:  # a tenth of the mean at least, or noise would fill the panel
        spreads = [score.spread or 0 for score in scores.values()]
        means = [score.mean for score in scores.values()]
        values = [x for score in scores.values() for x in score.values]
        values += [mean + side * spread for mean, spread in zip(means, spreads, strict=True) for side in (-1, 1)]
        middle = (min(values) + max(values)) / 2
        axes.set_ylim(*(middle + side * max(0.05 * middle, 0.55 * (max(values) - min(values))) for side in (-1, 1)))


def _within_percents(axes, measure: Measure) -> None:
    """Ten points at least, or noise would fill the panel; cut where there is nothing beyond, though a spread may reach there."""
    if measure.percent:
        low, high = axes.get_ylim()
        more = max(0, 10 - (high - low)) / 2
        low, high = max(low - more, -2), min(high + more, 102)
        high = max(high, min(low + 10, 102))
        axes.set_ylim(min(low, high - 10), high)


def _studys_lines(axes, found: dict, measure: Measure, size: str) -> None:
    """What the study published of the same measure and families, dotted."""
    if not measure.table or size not in ("340M", "1.3B"):
        return
    known = published.scores("both" if measure.name == "lm/average" else size)
    ratios = [tick.get_text() for tick in axes.get_xticklabels()]
    for family in dict.fromkeys(family for family, _ in found):
        points = [(i, 100 * known[family, r][measure.name]) for i, r in enumerate(ratios) if measure.name in known.get((family, r), {})]
        if points:
            axes.plot(*zip(*points, strict=True), ":", color=color(family), linewidth=1)
    axes.annotate("dotted: the study", (0.02, 0.02), xycoords="axes fraction", fontsize=8, color=REFERENCE)


def ruler_groups(models: Models, size: str, file: Path) -> Path | None:
    """A panel a group of RULER's tasks, as `by_ratio`. None without any."""
    found = {key[1:]: scores for key, scores in models.items() if key[0] == size}
    names = [n for n in ("Single", "MK", "MQ", "MV", "VT", "CWE+FWE", "QA") if any(f"ruler/{n}" in s for s in found.values())]
    if not names:
        return None

    with subplots(file, 1, len(names), size=(2.7 * len(names), 3.4), squeeze=False, sharey=True) as (figure, panels):
        for axes, name in zip(panels[0], names, strict=True):
            measure = Measure(f"ruler/{name}", name, percent=True)
            _ratio_panel(axes, found, {m: s[measure.name] for m, s in found.items() if measure.name in s}, measure)
            axes.set_xlabel("")
        _within_percents(axes, measure)  # of all panels, once all is drawn
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return file


def pareto(models: Models, costs: dict, size: str, measure: Measure, context: int, file: Path) -> Path | None:
    """Recall against FLOPs a token and bytes of state and cache at ``context`` tokens, the best for their cost joined. None without any."""
    points = {key[1:]: (scores[measure.name], costs[key]) for key, scores in models.items() if key[0] == size and measure.name in scores}
    if not points:
        return None
    scale = 100 if measure.percent else 1

    with subplots(file, 1, 2, size=(11, 4.6), sharey=True) as (figure, panels):
        titles = {"flops": f"FLOPs a token, forward, at {context:,} tokens", "bytes": f"bytes of state and KV cache at {context:,} tokens"}
        for axes, (cost, title) in zip(panels, titles.items(), strict=True):
            for (family, ratio), (score, price) in points.items():
                style = {"fmt": MARKERS.get(ratio, "x"), "color": color(family), "capsize": 2, "markersize": 7}
                axes.errorbar(price[cost], scale * score.mean, scale * (score.spread or 0), **style)
            front = frontier({model: (price[cost], score.mean) for model, (score, price) in points.items()})
            best = [(points[m][1][cost], scale * points[m][0].mean) for m in front]
            axes.plot(*zip(*best, strict=True), color=REFERENCE, linewidth=1, zorder=0)
            axes.set(title=title)
            _cost_axis(axes, [price[cost] for _, price in points.values()])
        _within_percents(axes, measure)
        panels[0].set_ylabel(measure.heading)
        figure.legend(handles=_legend(points), loc="outside lower center", ncols=8)
    return file


def _cost_axis(axes, values: list[float]) -> None:
    """Ticks such as 20 M; on a log scale where costs differ much."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if max(values) > 3 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter())


def frontier(points: dict[tuple[str, str], tuple[float, float]]) -> list[tuple[str, str]]:
    """Of {model: (cost, score)} those that no other model beats at the same cost or less, from the cheapest on."""
    best, front = float("-inf"), []
    for model, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if score > best:
            best = score
            front.append(model)
    return front


def _legend(points) -> list:
    from matplotlib.lines import Line2D

    families = sorted({family for family, _ in points}, key=place)
    ratios = [r for r in RATIOS if any(model[1] == r for model in points)]
    dots = [Line2D([], [], color=color(f), marker="o", ls="", label=title(f)) for f in families]
    titles = {ratio: "full attention" if ratio == "full" else ratio for ratio in ratios}
    return dots + [Line2D([], [], color=REFERENCE, marker=MARKERS[r], ls="", label=title) for r, title in titles.items()]
