"""The report's figures: perplexity during training and at the end, gaps, and cost.

One small panel for each context length. The page embeds each panel as a separate SVG, so that panels wrap on a narrow
screen and follow its colours; the PNG files put the panels of a figure side by side. Both come from one drawing.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from dashboards import drawing, numbers
from dashboards.drawing import INK, LINE, MUTED

WIDTH = 310  # of a panel, in points

# Colour on a light page, on a dark one, and marker. Each colour reads as text (contrast 4.5 or more), and the three
# methods stay distinct with protanopia, deuteranopia and tritanopia (CIE76 distance at least 22 on light, 17 on dark).
METHODS = {
    "full": ("#1a4a8a", "#6aa5f0", "o"),
    "lora+": ("#c24a1c", "#ff8f57", "s"),
    "lora": ("#1b8375", "#7fdcc4", "^"),
}
OTHERS = [
    ("#7a4fa0", "#c39be8", "D"),
    ("#8a6d00", "#e0c257", "v"),
    ("#a82d62", "#f58ab5", "P"),
    ("#7a4a2b", "#d8a27f", "X"),
]


# Markers of variants beyond the colours, which then repeat.
MARKERS = "os^DvPX<>*hp"


# Up to this many curves, each has a label and a band; beyond it there are no bands, and labels of each variant's best
# setting alone.
MOST_LABELLED = 6
# On a log axis a descent of up to this factor is shown in full.
TALLEST = 12


def styles(comparison: dict) -> dict[str, tuple[str, str, str]]:
    """Each variant's colour on light, colour on dark, and marker: the same in every figure."""
    names = dict.fromkeys(trial["variant"] for context in comparison["contexts"] for trial in context["trials"])
    if not comparison["axes"]:
        others = cycle(OTHERS)
        return {name: METHODS.get(name) or next(others) for name in names}
    colours = [*METHODS.values(), *OTHERS]
    return {
        name: (*colours[place % len(colours)][:2], MARKERS[place % len(MARKERS)]) for place, name in enumerate(names)
    }


def curves(figure: Any, comparison: dict, context: dict, against: str) -> None:
    """Perplexity against `step` or `tokens` at one context length, on a figure or subfigure."""
    looks = styles(comparison)
    lines = [
        (trial["name"], trial, points)
        for trial in context["trials"]
        if (points := [point for point in trial["curve"] if math.isfinite(point["perplexity"])])
    ]
    shown = [point for _, _, points in lines for point in _after_the_fall(points)]
    bottom, top = drawing.limits(shown, context["references"], reach=1.35)
    beyond = []
    if starts := [points[0]["perplexity"] for _, _, points in lines if points[0]["perplexity"] > top]:
        beyond.append(f"{_span(starts)} at step 0")
    beyond += [_labelled(reference) for reference in context["references"] if not reference["perplexity"] <= top]
    beyond += [
        f"{_labelled(reference)} (below)" for reference in context["references"] if reference["perplexity"] < bottom
    ]
    axes = drawing.panel(figure, context, "perplexity", (bottom, top), above=beyond, left=28, right=116)
    drawing.scale(axes, "y", bottom, top)
    labels: list[drawing.LineLabel] = []
    for reference in context["references"]:
        if bottom <= reference["perplexity"] <= top:
            axes.axhline(reference["perplexity"], color=MUTED, linewidth=0.8, dashes=(4, 3))
            labels.append((None, reference["perplexity"], _labelled(reference), MUTED))
    crowded = len(lines) > MOST_LABELLED
    if crowded:
        labels += [
            (
                None,
                one["final"]["perplexity"],
                f"{one['name']} {numbers.perplexity(one['final']['perplexity'], 1)}",
                colour,
            )
            for one in context["settings"]
            if one["chosen"] and bottom <= one["final"]["perplexity"] <= top
            for colour in looks[one["variant"]][:1]
        ]
    for name, trial, points in lines:
        colour, _, marker = looks[trial["variant"]]
        where, values = [point[against] for point in points], [point["perplexity"] for point in points]
        if crowded and not trial["chosen"]:
            axes.plot(where, values, color=colour, linewidth=0.7, alpha=0.45)
            continue
        low, high = (
            [point["perplexity"] if point[end] is None else point[end] for point in points] for end in ("low", "high")
        )
        if not crowded:
            axes.fill_between(where, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(where, values, color=colour, linewidth=1.4, marker=marker, markersize=3.4, markeredgewidth=0)
        state = "" if trial["state"] == "finished" else f", {trial['state']}"
        if not crowded:
            labels.append((where[-1], values[-1], f"{name} {numbers.perplexity(values[-1], 1)}{state}", colour))
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: numbers.short_count(value))
    axes.set_xlabel({"step": "optimiser steps", "tokens": "tokens trained on"}[against])
    drawing.label_ends(axes, labels)


def finals(figure: Any, comparison: dict, context: dict) -> None:
    """Final perplexity of each trial (with axes, setting) at one context length, above the untuned references."""
    looks = styles(comparison)
    ends = [trial["final"] for each in comparison["contexts"] for trial in each["trials"] if trial["final"]]
    references = [reference for each in comparison["contexts"] for reference in each["references"]]
    left, right = drawing.limits(ends, references, reach=1.6)
    rows = [
        (_in_margin(one["name"]), one["final"], *looks[one["variant"]][::2], one.get("state", ""))
        for one in _final_rows(comparison, context)
    ]
    rows += [(_in_margin(reference["label"]), reference, MUTED, "d", "") for reference in context["references"]]
    axes = drawing.panel(figure, context, "final perplexity", (left, right), left=132, right=62)
    drawing.scale(axes, "x", left, right)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for row, (name, end, colour, marker, state) in enumerate(rows):
        beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "color": colour}
        axes.annotate(name, (0, row), (-8, 0), ha="right", **beside)
        axes.annotate(numbers.perplexity(end["perplexity"], 1) if end else state, (1, row), (8, 0), **beside)
        if not end:
            continue
        low, high = (end["perplexity"] if end[bound] is None else end[bound] for bound in ("low", "high"))
        axes.plot([low, high], [row, row], color=colour, linewidth=3, alpha=0.3)
        axes.plot([end["perplexity"]], [row], marker, color=colour, markersize=5, markeredgewidth=0)
        if high > right:
            axes.annotate("→", (1, row), (3, 0), ha="right", size=12, **beside)
        if low < left:
            axes.annotate("←", (0, row), (-3, 0), ha="left", size=12, **beside)


def gaps(figure: Any, comparison: dict, context: dict) -> None:
    """Each variant's gap to its baseline at each evaluation; that is full fine-tuning if it was trained."""
    looks, called = styles(comparison), comparison["variant_labels"]
    lines = baseline_gaps(context)
    baselines = list(dict.fromkeys(line["baseline"] for line in lines))
    baseline, one_baseline = baselines[0], len(baselines) == 1
    zero = called[baseline] if one_baseline else "baseline"
    full = all(methods_of(context)[one] == "full" for one in baselines)
    shown = [point for line in lines for point in _after_the_fall(line["points"], "percent")]
    ends = [point[key] for point in shown for key in ("percent", "low", "high") if point[key] is not None]
    ends = [value for value in ends if math.isfinite(value)] + [0.0, 100 * comparison["as_good"]]
    margin = 0.06 * (max(ends) - min(ends))
    bottom, top = min(ends) - margin, max(ends) + margin
    hidden = [point["percent"] for line in lines for point in line["points"] if point["percent"] > top]
    above: list[str] | None = [f"{numbers.percent(max(hidden))} early on"] if hidden else []
    if not any(_fell(one["points"], "percent") for each in comparison["contexts"] for one in each["gaps"]):
        above = None
    above_what = called[baseline] if one_baseline else "full fine-tuning alike" if full else "the baseline"
    measure = f"perplexity above {above_what}, in percent"
    axes = drawing.panel(figure, context, measure, None, above=above, left=28, right=116)
    axes.set_ylim(bottom, top)
    axes.grid(visible=True, axis="y")
    axes.locator_params(axis="y", nbins=5)
    # The heading has the unit.
    axes.yaxis.set_major_formatter(drawing.plain_percent)
    colour_of_zero = looks[baseline][0] if one_baseline else INK
    axes.axhline(0, color=colour_of_zero, linewidth=1.4)
    labels: list[drawing.LineLabel] = [(None, 0.0, zero, colour_of_zero)]
    if full:
        within = 100 * comparison["as_good"]
        axes.axhline(within, color=MUTED, linewidth=0.8, dashes=(4, 3))
        labels.append((None, within, f"{within:g}% above", MUTED))
    for line in lines:
        colour, _, marker = looks[line["method"]]  # the variant's id
        points = [point for point in line["points"] if math.isfinite(point["percent"])]
        if not points:
            continue
        where, values = [point["step"] for point in points], [point["percent"] for point in points]
        low, high = (
            [point["percent"] if point[end] is None else point[end] for point in points] for end in ("low", "high")
        )
        if len(lines) <= MOST_LABELLED:
            axes.fill_between(where, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(where, values, color=colour, linewidth=1.4, marker=marker, markersize=3.4, markeredgewidth=0)
        labels.append((where[-1], values[-1], f"{called[line['method']]} {numbers.percent(values[-1])}", colour))
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: numbers.short_count(value))
    axes.set_xlabel("optimiser steps")
    drawing.label_ends(axes, labels)


def pareto(figure: Any, comparison: dict, context: dict) -> None:
    """Final perplexity by what it took; grey where another setting is at least as good for no more."""
    looks = styles(comparison)
    settings = context["settings"]
    bottom, top = drawing.limits([one["final"] for one in settings], context["references"], reach=1.35)
    axes = drawing.panel(figure, context, "final perplexity", (bottom, top), left=28, right=116)
    drawing.scale(axes, "y", bottom, top)
    most = max(one["hours"] for one in settings)
    axes.set_xlim(0, 1.12 * most if most else 1)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: numbers.short_count(float(f"{value:.6g}")))
    axes.set_xlabel(f"{context['hours_unit']} of training steps")
    labels: list[drawing.LineLabel] = []
    for reference in context["references"]:
        if bottom <= reference["perplexity"] <= top:
            axes.axhline(reference["perplexity"], color=MUTED, linewidth=0.8, dashes=(4, 3))
            labels.append((None, reference["perplexity"], _labelled(reference), MUTED))
    front = sorted((one["hours"], one["final"]["perplexity"]) for one in settings if not one["dominated"])
    if front:
        corners = [(front[0][0], top)]
        for (_, before), (hours, perplexity) in zip([(0, top), *front], front):
            corners += [(hours, before), (hours, perplexity)]
        corners.append((axes.get_xlim()[1], front[-1][1]))
        axes.plot(*zip(*corners), color=MUTED, linewidth=0.8, alpha=0.7, zorder=1)
    for one in settings:
        own, _, marker = looks[one["variant"]]
        colour = MUTED if one["dominated"] else own
        x, y, low, high = one["hours"], one["final"]["perplexity"], one["final"]["low"], one["final"]["high"]
        faint = 0.45 if one["dominated"] else 1
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=colour, linewidth=3, alpha=0.3 * faint)
        axes.plot([x], [y], marker, color=colour, markersize=5.5, markeredgewidth=0, alpha=faint)
        labels.append((x, y, f"{one['name']} {numbers.perplexity(y, 1)}", colour))
    drawing.label_ends(axes, labels)


def effects(figure: Any, comparison: dict, context: dict) -> None:
    """What each value of an axis changes with the others held, in percent of the perplexity, with its interval."""
    rows = context["effects"]
    everything = [one for each in comparison["contexts"] for one in each["effects"]]
    ends = [one[key] for one in everything for key in ("percent", "low", "high") if one[key] is not None]
    ends = [value for value in ends if math.isfinite(value)] + [0.0]
    margin = 0.08 * (max(ends) - min(ends)) or 1
    axes = drawing.panel(figure, context, "change of perplexity, in percent", None, left=132, right=62)
    drawing.scale_linear(axes, min(ends) - margin, max(ends) + margin)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, one in enumerate(rows):
        known = one["low"] is not None and one["high"] is not None
        colour = INK if known and (one["low"] > 0 or one["high"] < 0) else MUTED
        beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "color": colour}
        axes.annotate(_effect_name(one), (0, row), (-8, 0), ha="right", **beside)
        axes.annotate(numbers.percent(one["percent"]), (1, row), (8, 0), **beside)
        if known:
            axes.plot([one["low"], one["high"]], [row, row], color=colour, linewidth=3, alpha=0.3)
        axes.plot([one["percent"]], [row], "o", color=colour, markersize=5, markeredgewidth=0)


def methods_of(context: dict) -> dict[str, str]:
    """The method of each variant."""
    return {trial["variant"]: trial["method"] for trial in context["trials"]}


def baseline_gaps(context: dict) -> list[dict]:
    """The gaps of each variant to its baseline; a comparison without baselines has them first."""
    first = context["gaps"][0]["baseline"] if context["gaps"] else None
    baselines = context["baselines"] or {one["method"]: first for one in context["gaps"]}
    return [one for one in context["gaps"] if baselines.get(one["method"]) == one["baseline"]]


def _final_rows(comparison: dict, context: dict) -> list[dict]:
    """What has a final perplexity, or lacks it: each trial, or with axes each setting and unfinished trial."""
    if not comparison["axes"]:
        return context["trials"]
    return context["settings"] + [trial for trial in context["trials"] if not trial["final"]]


def _in_margin(name: str) -> str:
    """A row's name, in lines that fit beside a panel and break between the parts of a variant's name."""
    parts = name.split(" · ")
    whole = (part if len(part) > 22 else part.replace(" ", "\xa0") for part in parts)
    return textwrap.fill(" · ".join(whole) if len(parts) > 1 else name, 25)


def _row_height(names: Iterable[str]) -> int:
    """Points for each row of a panel with these names."""
    return 9 + 10 * max((_in_margin(name).count("\n") + 1 for name in names), default=1)


def _finals_height(comparison: dict) -> float:
    contexts = comparison["contexts"]
    rows = [_final_rows(comparison, each) for each in contexts]
    names = [one["name"] for each in rows for one in each]
    names += [one["label"] for each in contexts for one in each["references"]]
    height = 18 if _row_height(names) < 20 else _row_height(names)
    return 86 + height * max(len(each) + len(one["references"]) for each, one in zip(rows, contexts))


def _effect_name(effect: dict) -> str:
    """Both values, each on its own lines."""
    return "\n".join(textwrap.fill(text, 25) for text in (effect["value"], f"against {effect['against']}"))


def _effects_height(comparison: dict) -> float:
    every = [one for each in comparison["contexts"] for one in each["effects"]]
    height = 9 + 10 * max((_effect_name(one).count("\n") + 1 for one in every), default=1)
    return 86 + height * max(len(each["effects"]) for each in comparison["contexts"])


def _curves_height(comparison: dict) -> float:
    """Room for the labels of all variants and references beside their lines."""
    labels = [f"{name} 0.00" for name in comparison["variant_labels"].values()]
    labels += [f"{one['label']} 0.00" for one in comparison["contexts"][0]["references"]]
    lines = sum(len(textwrap.wrap(label, drawing.LABEL_CHARACTERS)) for label in labels)
    return max(262, 100 + drawing.LINE_HEIGHT * lines)


@dataclass(frozen=True)
class Kind:
    """A figure: its title, and how a panel of it is drawn."""

    title: str
    draw: Callable[[Any, dict, dict], None]
    height: Callable[[dict], float]  # of a panel, in points
    has: Callable[[dict], bool] = lambda context: True  # whether a context has data for it


FIGURES = {
    "final_perplexity": Kind(
        "Final perplexity of each method",
        finals,
        _finals_height,
    ),
    "effects": Kind(
        "Effect of each axis with the others held", effects, _effects_height, lambda context: bool(context["effects"])
    ),
    "perplexity_by_step": Kind("Perplexity by optimiser step", partial(curves, against="step"), _curves_height),
    "gap_by_step": Kind(
        "Gap between methods by optimiser step",
        gaps,
        _curves_height,
        lambda context: any(math.isfinite(p["percent"]) for one in context["gaps"][:1] for p in one["points"]),
    ),
    "perplexity_by_tokens": Kind("Perplexity by tokens trained on", partial(curves, against="tokens"), _curves_height),
    "perplexity_by_hours": Kind(
        "Quality against cost",
        pareto,
        lambda comparison: _curves_height(comparison) - 22,
        lambda context: bool(context["hours_unit"] and context["settings"]),
    ),
}


def title(comparison: dict, name: str) -> str:
    """A figure's title; of a sweep with axes it names settings in place of methods."""
    text = FIGURES[name].title
    return text.replace("method", "setting") if comparison["axes"] else text


def of(comparison: dict) -> dict[str, Kind]:
    """The figures for which some context has data."""
    return {name: kind for name, kind in FIGURES.items() if any(map(kind.has, comparison["contexts"]))}


def svg_panels(comparison: dict, name: str) -> list[tuple[dict, str]]:
    """(context, inline SVG element) for each context with data; its colours are the page's CSS variables."""
    kind = FIGURES[name]
    inks = {INK: "ink", MUTED: "muted", LINE: "line"}
    inks |= {look[0]: f"method-{index}" for index, look in enumerate(styles(comparison).values())}
    panels = []
    for index, context in enumerate(filter(kind.has, comparison["contexts"])):
        with drawing.style():
            figure = drawing.new_figure(WIDTH, kind.height(comparison))
            kind.draw(figure, comparison, context)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        text = re.sub(r'.*?<svg [^>]*(viewBox="[^"]*")[^>]*>', r"<svg \1>", buffer.getvalue(), count=1, flags=re.DOTALL)
        text = text.replace("xlink:href", "href")
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-{index}-", text)  # unique on the page
        for colour, ink in inks.items():
            text = text.replace(colour, f"var(--{ink})")
        panels.append((context, text))
    return panels


def write_png(comparison: dict, name: str, path: Path) -> Path:
    """Write the panels of one figure, three a row, under its title; returns the path."""
    kind = FIGURES[name]
    contexts = list(filter(kind.has, comparison["contexts"]))
    columns = max(1, min(3, len(contexts)))
    rows = max(1, math.ceil(len(contexts) / columns))
    header, height = 42, rows * kind.height(comparison)
    origin = f"{comparison['model']['name']} on {comparison['data']['name']}"
    with drawing.style():
        figure = drawing.new_figure(columns * WIDTH, header + height)
        top, body = figure.subfigures(2, 1, height_ratios=[header, height], hspace=0)
        top.text(0.02 / columns, 18 / header, title(comparison, name), size=12, weight="bold")
        top.text(0.02 / columns, 5 / header, f"{origin}, {comparison['confidence']:.0%} intervals", color=MUTED)
        for place, context in zip(body.subfigures(rows, columns, squeeze=False, hspace=0, wspace=0).flat, contexts):
            kind.draw(place, comparison, context)
        figure.savefig(path, dpi=200, facecolor="white")
    return path


def _after_the_fall(points: list[dict], measure: str = "perplexity") -> list[dict]:
    """Without the first point if it is so far above the last that it would flatten every difference."""
    return points[1:] if _fell(points, measure) else points


def _fell(points: list[dict], measure: str) -> bool:
    return len(points) > 2 and points[0][measure] > TALLEST * abs(points[-1][measure])


def _labelled(reference: dict) -> str:
    return f"{reference['label']} {numbers.perplexity(reference['perplexity'], 1)}"


def _span(values: list[float]) -> str:
    low, high = (numbers.perplexity(value, 1) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
