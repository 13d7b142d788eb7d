"""The parts of figures: style, panels, scales, and labels beside their lines.

Lengths are in points. matplotlib is imported where it is used, since importing it takes a second.
"""

import math
import textwrap
from contextlib import AbstractContextManager
from typing import Any

from dashboards import numbers

# (x of the line's end or None for the right edge, y, text, colour)
LineLabel = tuple[float | None, float, str, str]
INK, MUTED, LINE = "#1b1f24", "#5c6670", "#dde2e7"
LINE_HEIGHT = 11.3
LABEL_CHARACTERS = 24  # in a line of a label beside a curve
# The notes above a panel: font size and mean width of a character, in points.
NOTE_SIZE, NOTE_CHARACTER = 8.6, 5.0


def style() -> AbstractContextManager:
    """A context in which matplotlib draws as the report does."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    known = {font.name for font in fontManager.ttflist}
    settings = {
        "font.family": [
            name for name in ("Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans") if name in known
        ],
        "font.size": 9.2,
        "text.color": INK,
        "text.parse_math": False,  # a name with two dollar signs is a name, not a formula
        "svg.fonttype": "none",
        "svg.hashsalt": "longspan",  # the same comparison gives the same bytes
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 9,
        "axes.labelpad": 5,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
    }
    for axis, tick in (("x", 3), ("y", 0)):
        settings |= {f"{axis}tick.color": LINE, f"{axis}tick.labelcolor": MUTED, f"{axis}tick.labelsize": 9}
        settings[f"{axis}tick.major.size"] = tick
    return matplotlib.rc_context(settings)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, without a window system."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    return Figure(figsize=(width / 72, height / 72))


def panel(
    figure: Any,
    context: dict,
    measure: str,
    limits: tuple[float, float] | None,
    *,
    above: list[str] | None = None,
    left: float,
    right: float,
) -> Any:
    """Axes under a heading: the context length, the measure, and what is off the chart.

    Two lines are reserved for the latter if `above` is a list, so that panels side by side align. `limits` are the
    range of the measure, which decides between a linear and a log scale; None is always linear.
    """
    dpi = figure.get_figure(root=True).dpi
    width, height = figure.bbox.width / dpi * 72, figure.bbox.height / dpi * 72
    characters = int(0.96 * width / NOTE_CHARACTER)
    notes = textwrap.wrap("↑ off the chart: " + "; ".join(above), characters) if above else []
    top = 46 + LINE_HEIGHT * max(len(notes), 0 if above is None else 2)
    figure.text(0.02, 1 - 16 / height, f"{context['context_length']:,} tokens", size=11, weight="bold")
    scaled = f"{measure}, log scale" if limits and _logarithmic(*limits) else measure
    figure.text(0.02, 1 - 30 / height, scaled, color=MUTED)
    for row, note in enumerate(notes):
        figure.text(0.02, 1 - (42.5 + LINE_HEIGHT * row) / height, note, color=MUTED, size=NOTE_SIZE)
    return figure.add_axes((left / width, 34 / height, (width - left - right) / width, (height - top - 34) / height))


def limits(points: list[dict], references: list[dict], reach: float) -> tuple[float, float]:
    """The range of every point with its interval, and of references up to a factor of `reach` above the points.

    References below, which tuning has to beat, are shown down to a factor of 4.
    """
    values = [point[key] for point in points or references for key in ("perplexity", "low", "high")]
    values = [value for value in values if value is not None and 0 < value < math.inf] or [1, 10]
    near = [one["perplexity"] for one in references if min(values) / 4 <= one["perplexity"] <= max(values) * reach]
    bottom, top = min(values + near), max(values + near)
    margin = max(1.02, (top / bottom) ** 0.06)
    return bottom / margin, top * margin


def scale(axes: Any, axis: str, low: float, high: float) -> None:
    """Set an axis' range, with a grid and ticks at round numbers such as 2, 3, 5, 10; the other axis has none."""
    axes.set(**{f"{axis}scale": "log" if _logarithmic(low, high) else "linear", f"{axis}lim": (low, high)})
    axes.grid(visible=True, axis=axis)
    if axis == "x":
        axes.set_yticks([])
    line = getattr(axes, f"{axis}axis")
    if _logarithmic(low, high):
        line.set_ticks(_plain_ticks(low, high))
        line.set_ticks([], minor=True)
    else:
        axes.locator_params(axis=axis, nbins=5)
    line.set_major_formatter(lambda value, _: numbers.short_count(round(value, 6)))


def plain_percent(value: float, _: Any = None) -> str:
    """A tick of a scale whose heading has the unit: +5, −2.5, 0."""
    return numbers.percent(value).removesuffix("%").removesuffix(".0") if value else "0"


def scale_linear(axes: Any, low: float, high: float) -> None:
    """Set the range of a horizontal axis in percent, which zero may be part of; the other axis has no ticks."""
    axes.set_xlim(low, high)
    axes.grid(visible=True, axis="x")
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(plain_percent)


def _logarithmic(low: float, high: float) -> bool:
    return high > 2 * low


def _plain_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = []
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 2, 3, 5, 7),
        (1, 1.5, 2, 3, 4, 5, 7),
        (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8),
    ):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= 4:
            break
    return ticks


def label_ends(axes: Any, labels: list[LineLabel]) -> None:
    """Label lines in the right margin.

    Labels that would touch are pushed apart; a thin line leads to each.
    """
    height = axes.bbox.height / axes.figure.get_figure(root=True).dpi * 72
    to_axes, edge = axes.transScale + axes.transLimits, axes.get_xlim()[1]
    heights = {label: to_axes.transform((edge, label[1]))[1] * height for label in labels}
    labels = sorted(labels, key=lambda label: heights[label])
    texts = [textwrap.fill(text, LABEL_CHARACTERS) for _, _, text, _ in labels]
    sizes = [LINE_HEIGHT * (1 + text.count("\n")) for text in texts]
    places = spread([heights[label] for label in labels], sizes, height)
    for label, text, place in zip(labels, texts, places):
        x, y, _, colour = label
        thin = {"color": colour, "linewidth": 0.6, "alpha": 0.6}
        axes.plot([edge if x is None else x, edge], [y, y], dashes=(1, 2), **thin)
        ends = [heights[label] / height, place / height]
        axes.plot([1, 1.04], ends, transform=axes.transAxes, clip_on=False, **thin)
        axes.annotate(text, (1, ends[1]), (10, 0), "axes fraction", "offset points", va="center", color=colour)


def spread(wanted: list[float], sizes: list[float], height: float, passes: int = 200) -> list[float]:
    """Places near the wanted ones (ascending) at which labels of these sizes do not overlap, within 0 to `height`."""
    places = list(wanted)
    for _ in range(passes):
        for at in range(len(places) - 1):
            overlap = (sizes[at] + sizes[at + 1]) / 2 - (places[at + 1] - places[at])
            if overlap > 0:
                places[at] -= overlap / 2
                places[at + 1] += overlap / 2
        places = [min(max(place, size / 2 - 6), height - size / 2 + 6) for place, size in zip(places, sizes)]
    return places
