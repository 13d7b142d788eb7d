"""The results as PNG files, in the style of longspan's reports. matplotlib is imported where it is used."""

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


def perplexity_picture(result: dict[str, Any], path: Path) -> Path:
    """Perplexity against length, a line for each rule, with intervals over documents."""
    lengths = [row["length"] for row in result["lengths"]]
    with _style():
        figure, axes = _figure(
            result, "Perplexity by length", 470, 308,
            f"{result['data']['name']}, {result['data']['documents']} documents, full attention; "
            f"{result['confidence']:.0%} intervals",
        )  # fmt: skip
        for (rule, text), colour, marker in zip(result["rules"].items(), (BLUE, ORANGE), "os"):
            scores = [row["rules"][rule] for row in result["lengths"]]
            values = [score["perplexity"] for score in scores]
            if len(lengths) == 1:
                _single_score(axes, lengths[0], scores[0], text, colour, marker, left=rule == "all")
                continue
            if all(score["low"] is not None for score in scores):
                low, high = ([score[end] for score in scores] for end in ("low", "high"))
                axes.fill_between(lengths, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(lengths, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=text)
        everything = [row["rules"][rule]["perplexity"] for row in result["lengths"] for rule in result["rules"]]
        if max(everything) > 4 * min(everything):
            axes.set_yscale("log")
            axes.set_yticks(_plain_ticks(*axes.get_ylim()))
            axes.set_yticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True, axis="y")
        axes.set_ylabel("perplexity per token" + (", log scale" if axes.get_yscale() == "log" else ""))
        figure.legend(
            loc="upper left",
            bbox_to_anchor=(4 / 470, 1 - 50 / 308),
            ncols=2,
            frameon=False,
            fontsize=9,
            handlelength=1.6,
        )
        _length_axis(axes, lengths, result)
        return _save(figure, path)


def _single_score(
    axes: Any, length: int, score: dict[str, Any], rule: str, colour: str, marker: str, left: bool
) -> None:
    """Draws a point a rule, side by side, with interval and value: one length has no line and no band."""
    place, side = (length / 1.02, -1) if left else (length * 1.02, 1)
    if score["low"] is not None:
        axes.plot([place, place], [score["low"], score["high"]], color=colour, linewidth=3, alpha=0.3)
    axes.plot([place], [score["perplexity"]], marker, color=colour, markersize=5, label=rule)
    axes.annotate(
        f"{score['perplexity']:,.3f}", (place, score["perplexity"]), (8 * side, 0), "data", "offset points",
        ha="right" if left else "left", va="center", color=colour,
    )  # fmt: skip


def passkey_picture(result: dict[str, Any], path: Path) -> Path:
    """The heat map: rows depth, columns length, colour the share of tests passed."""
    rows = result["lengths"]
    depths = sorted({cell["depth"] for row in rows for cell in row["depths"]})
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    colours = LinearSegmentedColormap.from_list("accuracy", [LIGHT, BLUE])
    with _style():
        width = 150 + max(220, 46 * len(rows))
        figure, axes = _figure(
            result, "Passkey retrieval", width, 138 + 26 * max(4, len(depths)),
            f"share of keys found (dark: all), {rows[0]['tests']} tests each length",
        )  # fmt: skip
        for column, row in enumerate(rows):
            for cell in row["depths"]:
                share, place = cell["correct"] / cell["tests"], depths.index(cell["depth"])
                axes.add_patch(_square(column, place, colours(share)))
                ink = "white" if sum(to_rgb(colours(share))) < 1.6 else INK
                axes.text(column, place, f"{share:.0%}", ha="center", va="center", color=ink, size=8.6)
        axes.set(xlim=(-0.5, len(rows) - 0.5), ylim=(len(depths) - 0.5, -0.5))
        axes.set_xticks(range(len(rows)), [_short(row["length"]) for row in rows])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("length, tokens")
        axes.set_ylabel("depth of the key (0%: at the start)")
        inside = sum(row["length"] <= result["model"]["original_context_length"] for row in rows)
        if 0 < inside < len(rows):
            axes.axvline(inside - 0.5, color=ORANGE, linewidth=1.6)
            axes.annotate(
                "beyond the original context →", (inside - 0.5, 1), (4, 4), ("data", "axes fraction"), "offset points",
                color=ORANGE, size=8.6,
            )  # fmt: skip
        return _save(figure, path)


def topics_picture(result: dict[str, Any], path: Path) -> Path:
    """Accuracy against length, with Wilson intervals."""
    rows = result["lengths"]
    lengths = [row["length"] for row in rows]
    with _style():
        figure, axes = _figure(
            result, "Topic retrieval" if "topics" in result["what"] else "Line retrieval", 470, 308,
            f"{result['what']}; {result['confidence']:.0%} intervals",
        )  # fmt: skip
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
        _length_axis(axes, lengths, result)
        return _save(figure, path)


PICTURES = {"perplexity": perplexity_picture, "passkey": passkey_picture, "topics": topics_picture}


def _style() -> AbstractContextManager:
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


def _figure(result: dict[str, Any], title: str, width: float, height: float, note: str) -> tuple[Any, Any]:
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


def _length_axis(axes: Any, lengths: list[int], result: dict[str, Any]) -> None:
    """Draws lengths on a log scale, each with its tick, and the model's original context length."""
    original = result["model"]["original_context_length"]
    axes.set_xscale("log")
    axes.set_xlim(min(lengths) / 1.15, max(lengths) * 1.15)
    labels = [_short(length) for length in lengths]
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


def _plain_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for decade in decades for step in (1, 2, 5) if low <= (tick := step * 10.0**decade) <= high]


def _square(column: int, row: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor=colour, linewidth=0)


def _short(length: int) -> str:
    """2,048 as 2k; a length that is no multiple of 1,024 in full."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=200, facecolor="white")
    return path
