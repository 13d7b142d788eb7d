"""The report's pictures: perplexity while training, and where it ended.

One small panel for each context length. The page embeds every panel as an SVG of its own, so that panels wrap on a
narrow screen and follow its colours; the PNG files put the panels of a figure side by side. Both come from one drawing.
Lengths are in points. matplotlib is imported where it is used: it takes a second, and most readers of this room's
functions want numbers first.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import Any

from dashboards import wording

# Colour on a light page, on a dark one, and marker. The three methods differ in brightness as well as hue and stay apart
# with protanopia, deuteranopia and tritanopia (least CIE76 distance 20 on light, 17 on dark).
METHODS = {
    "full": ("#1a4a8a", "#6aa5f0", "o"),
    "lora+": ("#cf5120", "#ff8f57", "s"),
    "lora": ("#1f8f80", "#7fdcc4", "^"),
}
OTHERS = [
    ("#7a4fa0", "#c39be8", "D"),
    ("#8a6d00", "#e0c257", "v"),
    ("#a82d62", "#f58ab5", "P"),
    ("#4d5a66", "#b5c0cb", "X"),
]
INK, MUTED, LINE = "#1b1f24", "#5c6670", "#dde2e7"

WIDTH = 310
LABELS = 98  # the margin in which labels stand, beside what they name
LINE_HEIGHT = 10.5

Draw = Callable[[Any, dict, dict], None]  # onto a figure or subfigure: a comparison's context


def styles(comparison: dict) -> dict[str, tuple[str, str, str]]:
    """Each method's colour on light, colour on dark, and marker: the same in every figure."""
    names = dict.fromkeys(trial["method"] for context in comparison["contexts"] for trial in context["trials"])
    others = cycle(OTHERS)
    return {name: METHODS.get(name) or next(others) for name in names}


def curves(figure: Any, comparison: dict, context: dict, against: str) -> None:
    """Perplexity against `step` or `tokens` at one context length."""
    looks = styles(comparison)
    lines = [
        (name, trial, points)
        for name, trial in zip(wording.trial_names(context["trials"]), context["trials"])
        if (points := [point for point in trial["curve"] if math.isfinite(point["perplexity"])])
    ]
    bottom, top = _limits([_after_the_fall(points) for _, _, points in lines], context["references"], reach=1.35)
    starts = [points[0]["perplexity"] for _, _, points in lines if points[0]["perplexity"] > top]
    beyond = [f"step 0: {_range(starts)}"] if starts else []
    beyond += [_labelled(reference) for reference in context["references"] if reference["perplexity"] > top]
    measure = "perplexity, log scale" if _logarithmic(bottom, top) else "perplexity"
    axes = _panel(figure, context, measure, beyond, right=LABELS)
    _scale(axes, "y", bottom, top)
    labels = []
    for reference in context["references"]:
        if bottom <= reference["perplexity"] <= top:
            axes.axhline(reference["perplexity"], color=MUTED, linewidth=0.8, dashes=(4, 3))
            labels.append((None, reference["perplexity"], _labelled(reference), MUTED))
    for name, trial, points in lines:
        colour, _, marker = looks[trial["method"]]
        where, values = [point[against] for point in points], [point["perplexity"] for point in points]
        low = [point["perplexity"] if point["low"] is None else point["low"] for point in points]
        high = [point["perplexity"] if point["high"] is None else point["high"] for point in points]
        axes.fill_between(where, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(where, values, color=colour, linewidth=1.4, marker=marker, markersize=3.4, markeredgewidth=0)
        state = "" if trial["state"] == "finished" else f", {trial['state']}"
        labels.append((where[-1], values[-1], f"{name} {wording.perplexity(values[-1], 1)}{state}", colour))
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: wording.short_count(value))
    axes.set_xlabel({"step": "optimiser steps", "tokens": "tokens trained on"}[against])
    axes.set_xlim(left=0)
    _label(axes, labels)


def finals(figure: Any, comparison: dict, context: dict) -> None:
    """Where each method ended at one context length, with its interval, above the untuned references."""
    looks = styles(comparison)
    ends = [[trial["final"]] for each in comparison["contexts"] for trial in each["trials"] if trial["final"]]
    references = [reference for each in comparison["contexts"] for reference in each["references"]]
    left, right = _limits(ends, references, reach=1.6)
    names = wording.trial_names(context["trials"])
    rows = [
        (name, trial["final"], looks[trial["method"]][0], looks[trial["method"]][2], trial["state"])
        for name, trial in zip(names, context["trials"])
    ]
    rows += [(reference["label"], reference, MUTED, "d", "") for reference in context["references"]]
    measure = "final perplexity, log scale" if _logarithmic(left, right) else "final perplexity"
    axes = _panel(figure, context, measure, None, left=124, right=50)
    _scale(axes, "x", left, right)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for row, (name, end, colour, marker, state) in enumerate(rows):
        beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "color": colour}
        axes.annotate(name, (0, row), (-8, 0), ha="right", **beside)
        axes.annotate(wording.perplexity(end["perplexity"], 1) if end else state, (1, row), (8, 0), **beside)
        if end and not left <= end["perplexity"] <= right:
            axes.annotate("→", (1, row), (0, 0), ha="right", **beside)
        elif end:
            if end["low"] is not None and end["high"] is not None:
                axes.plot([end["low"], end["high"]], [row, row], color=colour, linewidth=3, alpha=0.3)
            axes.plot([end["perplexity"]], [row], marker, color=colour, markersize=5, markeredgewidth=0)


FIGURES: dict[str, tuple[str, Draw, Callable[[dict], float]]] = {
    # name: title, drawing, height of a panel
    "final_perplexity": (
        "Where each method ends",
        finals,
        lambda comparison: (
            84 + 17 * max(len(each["trials"]) + len(each["references"]) for each in comparison["contexts"])
        ),
    ),
    "perplexity_by_step": ("Perplexity by optimiser step", lambda *to: curves(*to, against="step"), lambda _: 238),
    "perplexity_by_tokens": (
        "Perplexity by tokens trained on",
        lambda *to: curves(*to, against="tokens"),
        lambda _: 238,
    ),
}


def svg_panels(comparison: dict, name: str) -> list[str]:
    """One inline SVG element a context length; its colours are the page's CSS variables, its text the page's."""
    _, draw, height = FIGURES[name]
    inks = {INK: "ink", MUTED: "muted", LINE: "line"}
    inks |= {look[0]: f"method-{index}" for index, look in enumerate(styles(comparison).values())}
    panels = []
    for index, context in enumerate(comparison["contexts"]):
        with _style():
            figure = _figure(WIDTH, height(comparison))
            draw(figure, comparison, context)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        text = buffer.getvalue()
        text = re.sub(r'.*?<svg [^>]*(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1, flags=re.DOTALL)
        text = re.sub(r"xlink:href", "href", text)
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-{index}-", text)  # unique on the page
        for colour, ink in inks.items():
            text = text.replace(colour, f"var(--{ink})")
        panels.append(text)
    return panels


def write_png(comparison: dict, name: str, path: Path) -> Path:
    """The panels of one figure, three a row, under its title."""
    title, draw, height = FIGURES[name]
    contexts = comparison["contexts"]
    columns = min(3, len(contexts))
    rows, header = math.ceil(len(contexts) / columns), 40
    note = f"{comparison['model']['name']} on {comparison['data']['name']}. Bands and bars: {comparison['confidence']:.0%} confidence."
    with _style():
        figure = _figure(columns * WIDTH, header + rows * height(comparison))
        top, body = figure.subfigures(2, 1, height_ratios=[header, rows * height(comparison)], hspace=0)
        top.text(0.02 / columns, 16 / header, title, size=12, weight="bold")
        top.text(0.02 / columns, 3 / header, note, color=MUTED)
        for place, context in zip(body.subfigures(rows, columns, squeeze=False, hspace=0, wspace=0).flat, contexts):
            draw(place, comparison, context)
        figure.savefig(path, dpi=200, facecolor="white")
    return path


def _style() -> AbstractContextManager:
    import matplotlib
    from matplotlib.font_manager import fontManager

    known = {font.name for font in fontManager.ttflist}
    family = [name for name in ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans") if name in known]
    return matplotlib.rc_context(
        {
            "font.family": family, "font.size": 8.5, "text.color": INK, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "longspan",
            "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.labelsize": 8.5, "axes.spines.top": False,
            "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.axisbelow": True,
            "axes.labelpad": 5, "grid.color": LINE, "grid.linewidth": 0.7, "xtick.color": LINE, "ytick.color": LINE,
            "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
            "ytick.major.size": 0, "xtick.major.size": 3, "axes.facecolor": "none", "figure.facecolor": "none",
        }
    )  # fmt: skip


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    return Figure(figsize=(width / 72, height / 72))


def _panel(
    figure: Any, context: dict, measure: str, beyond: list[str] | None, left: float = 30, right: float = 16
) -> Any:
    """Axes under a heading: the context length, what is measured, and what lies above the chart."""
    dpi = figure.get_figure(root=True).dpi
    width, height = figure.bbox.width / dpi * 72, figure.bbox.height / dpi * 72
    notes = textwrap.wrap("↑ above the chart: " + " · ".join(beyond), 62) if beyond else []
    top = 44 + LINE_HEIGHT * max(len(notes), 0 if beyond is None else 2)
    figure.text(0.02, 1 - 16 / height, f"{context['context_length']:,} tokens", size=10.5, weight="bold")
    figure.text(0.02, 1 - 29 / height, measure, color=MUTED)
    for row, note in enumerate(notes):
        figure.text(0.02, 1 - (40.5 + LINE_HEIGHT * row) / height, note, color=MUTED, size=8)
    return figure.add_axes((left / width, 34 / height, (width - left - right) / width, (height - top - 34) / height))


def _after_the_fall(points: list[dict]) -> list[dict]:
    """Without the first point where it is far above the rest: it would flatten every difference between methods."""
    return points[1:] if len(points) > 2 and points[0]["perplexity"] > 1.5 * points[1]["perplexity"] else points


def _limits(groups: list[list[dict]], references: list[dict], reach: float) -> tuple[float, float]:
    """The range that shows every point with its interval, and each reference no further off than a factor of `reach`."""
    points = [point for points in groups for point in points] or references
    values = [point[key] for point in points for key in ("perplexity", "low", "high") if point[key] is not None]
    values = [value for value in values if 0 < value < math.inf] or [1, 10]
    bottom, top = min(values), max(values)
    near = [each["perplexity"] for each in references if bottom / reach <= each["perplexity"] <= top * reach]
    bottom, top = min([bottom, *near]), max([top, *near])
    margin = max(1.02, (top / bottom) ** 0.06)
    return bottom / margin, top * margin


def _logarithmic(low: float, high: float) -> bool:
    return high > 2 * low


def _scale(axes: Any, axis: str, low: float, high: float) -> None:
    """Sets the range, with ticks at plain numbers such as 2, 3, 5, 10, and a grid along this axis alone."""
    axes.set(**{f"{axis}scale": "log" if _logarithmic(low, high) else "linear", f"{axis}lim": (low, high)})
    line = axes.yaxis if axis == "y" else axes.xaxis
    axes.grid(visible=False, axis="x" if axis == "y" else "y")
    if axis == "x":
        axes.set_yticks([])
    if _logarithmic(low, high):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
            ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
            if len(ticks) >= 4:
                break
        line.set_ticks(ticks)
        line.set_ticks([], minor=True)
    else:
        axes.locator_params(axis=axis, nbins=5)
    line.set_major_formatter(lambda value, _: wording.short_count(round(value, 6)))


def _label(axes: Any, labels: list[tuple[float | None, float, str, str]]) -> None:
    """Names each line at its end: (x of the end or None for the edge, y, text, colour), pushed apart where they would touch."""
    height = axes.bbox.height / axes.figure.get_figure(root=True).dpi * 72
    to_fraction = axes.transScale + axes.transLimits
    placed = sorted(
        (to_fraction.transform((0, y))[1] * height, x, y, textwrap.fill(text, 21), colour)
        for x, y, text, colour in labels
    )
    sizes = [LINE_HEIGHT * (1 + text.count("\n")) for *_, text, _ in placed]
    for wanted, size, (at, x, y, text, colour) in zip(
        _spread([each[0] for each in placed], sizes, height), sizes, placed
    ):
        edge = axes.get_xlim()[1]
        axes.plot([edge if x is None else x, edge], [y, y], color=colour, linewidth=0.6, alpha=0.5, dashes=(1, 2))
        axes.plot([1, 1 + 7 / 182], [at / height, wanted / height], color=colour, linewidth=0.6, alpha=0.6, clip_on=False,
                  transform=axes.transAxes)  # fmt: skip
        axes.annotate(text, (1, wanted / height), (9, 0), "axes fraction", "offset points", va="center", color=colour,
                      linespacing=1.05, annotation_clip=False)  # fmt: skip


def _spread(wanted: list[float], sizes: list[float], height: float) -> list[float]:
    """Positions near the wanted ones (ascending) at which labels of these sizes do not overlap: a few passes of pushing."""
    places = list(wanted)
    for _ in range(200):
        for at in range(len(places) - 1):
            overlap = (sizes[at] + sizes[at + 1]) / 2 - (places[at + 1] - places[at])
            if overlap > 0:
                places[at] -= overlap / 2
                places[at + 1] += overlap / 2
        places = [min(max(place, size / 2 - 8), height - size / 2 + 8) for place, size in zip(places, sizes)]
    return places


def _labelled(reference: dict) -> str:
    return f"{reference['label']} {wording.perplexity(reference['perplexity'], 1)}"


def _range(values: list[float]) -> str:
    low, high = (wording.perplexity(value, 1) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
