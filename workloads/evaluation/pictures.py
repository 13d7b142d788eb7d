"""What the pictures of evaluations share, in the style of longspan's reports. Imports matplotlib where it is used."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from workloads.models.positions import POSITIONS

# The report's colours. Blue and orange differ with every colour vision deficiency, and are readable on white.
INK, MUTED, LINE, BLUE, ORANGE = "#1b1f24", "#5c6670", "#dde2e7", "#1a4a8a", "#c24a1c"
# Light is wrong and dark is right: lightness alone shows it, in a grey print too.
LIGHT = "#f6ead9"


def style() -> AbstractContextManager[None]:
    """Fonts and colours of the figures made inside this context."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    known = {font.name for font in fontManager.ttflist}
    return matplotlib.rc_context(
        {
            "font.family": [
                name for name in ("Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans") if name in known
            ],
            "font.size": 9.2,
            "text.color": INK,
            "text.parse_math": False,  # a name with two dollar signs is a name, not a formula
            "axes.edgecolor": LINE,
            "axes.labelcolor": MUTED,
            "axes.labelsize": 9,
            "axes.spines.left": False,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.axisbelow": True,
            "grid.color": LINE,
            "grid.linewidth": 0.7,
            "xtick.color": LINE,
            "ytick.color": LINE,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "ytick.major.size": 0,
        }
    )


def figure(result: dict[str, Any], title: str, width: float, height: float, note: str) -> tuple[Any, Any]:
    """A figure (size in points) with its heading, and axes below it."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(width / 72, height / 72))
    model = result["model"]
    name = (
        model["label"] if model["positions"] == "none" else f"{model['label']}, {POSITIONS[model['positions']].label}"
    )
    figure.text(12 / width, 1 - 18 / height, title, size=12, weight="bold")
    figure.text(12 / width, 1 - 33 / height, name, color=INK, size=9.2)
    figure.text(12 / width, 1 - 46 / height, note, color=MUTED, size=8.6)
    return figure, figure.add_axes((56 / width, 44 / height, (width - 80) / width, (height - 130) / height))


def accuracy_by_length(result: dict[str, Any], path: Path, title: str) -> Path:
    """Accuracy of retrieval tests against length, with Wilson intervals."""
    rows = result["lengths"]
    lengths = [row["length"] for row in rows]
    with style():
        drawing, axes = figure(result, title, 470, 308, f"{result['what']}; {result['confidence']:.0%} intervals")
        values = [row["accuracy"] for row in rows]
        errors = [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]
        axes.errorbar(
            lengths, values, [[max(0.0, error) for error in side] for side in errors],
            color=BLUE, marker="o", markersize=4.5, linewidth=1.4, elinewidth=1, capsize=3,
        )  # fmt: skip
        for row in rows:
            if not row["group"].endswith("tokens"):
                axes.annotate(row["group"].split()[0], (row["length"], row["accuracy"]), (5, 5),
                              textcoords="offset points", color=MUTED, size=8.4)  # fmt: skip
        if len(rows) == 1:
            axes.annotate(
                f"{rows[0]['correct']} of {rows[0]['tests']}", (lengths[0], values[0]), (8, 0), "data", "offset points",
                va="center", color=BLUE,
            )  # fmt: skip
        axes.grid(visible=True, axis="y")
        axes.set_ylim(-0.04, 1.08)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.set_ylabel("correct answers")
        length_axis(axes, lengths, result)
        return save(drawing, path)


def length_axis(axes: Any, lengths: list[int], result: dict[str, Any]) -> None:
    """Draws lengths on a log scale, each with its tick, and the model's original context length."""
    original = result["model"]["original_context_length"]
    axes.set_xscale("log")
    axes.set_xlim(min(lengths) / 1.15, max(lengths) * 1.15)
    labels = [short(length) for length in lengths]
    for index in range(len(lengths) - 2, -1, -1):  # from the longest down, a label only where it fits
        nearest = next(length for length, label in zip(lengths[index + 1 :], labels[index + 1 :]) if label)
        room = math.log(nearest / lengths[index]) / math.log(1.3 * max(lengths) / min(lengths))
        labels[index] = labels[index] if room > 0.08 else ""
    axes.set_xticks(lengths, labels)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("length, tokens" + (" (log scale)" if len(lengths) > 1 else ""))
    if min(lengths) <= original < max(lengths):
        axes.axvline(original, color=MUTED, linewidth=0.9, dashes=(4, 3))
        axes.annotate(
            "original context", (original, 1), (4, 3), ("data", "axes fraction"), "offset points",
            color=MUTED, size=8.6,
        )  # fmt: skip


def plain_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten, for a log scale from ``low`` to ``high``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for decade in decades for step in (1, 2, 5) if low <= (tick := step * 10.0**decade) <= high]


def square(column: int, row: int, colour: Any) -> Any:
    """A cell of a heat map."""
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor=colour, linewidth=0)


def short(length: int) -> str:
    """2,048 as 2k; a length that is no multiple of 1,024 in full."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def save(figure: Any, path: Path) -> Path:
    """Writes a figure as a PNG file and returns its path."""
    figure.savefig(path, dpi=200, facecolor="white")
    return path
