"""The speeds of ``benchmarks.training_speed`` as a picture: for each case the baselines, longspan and the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case, Implementation, Row, baseline
from dashboards.drawing import INK, MUTED, new_figure, style

# (bar, text on it). They differ in lightness, which colour vision deficiency and grey print preserve.
COLOURS: dict[Implementation, tuple[str, str]] = {
    "user's way": ("#e3e7eb", INK),
    "Liger": ("#cbd2d9", INK),
    "Unsloth": ("#b1bac4", INK),
    "published S²": ("#8f9ba8", INK),
    "longspan": ("#1a4a8a", "white"),
}
LIMIT = "#c24a1c"
BAR, GAP, LINE = 15, 14, 13
LEFT, RIGHT, TOP, BOTTOM, WIDTH = 150, 24, 66, 50, 640


def draw(machine: dict[str, Any], rows: dict[str, Row], path: Path) -> None:
    """Writes a PNG of longspan's measured cases, each with its measured baselines.

    Raises:
        SystemExit: there are none.
    """
    groups = [
        (case, bars(case, rows)) for case in CASES.values() if case.implementation == "longspan" and speed(case, rows)
    ]
    if not groups:
        raise SystemExit("the JSON file has no measured case of longspan to draw; run the benchmark on a GPU first")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    inner = sum(space(case, found) for case, found in groups) + GAP * (len(groups) - 1)
    height = TOP + inner + BOTTOM
    with style():
        figure = new_figure(WIDTH, height)
        figure.set_facecolor("white")
        place = (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - RIGHT) / WIDTH, inner / height)
        axes = figure.add_axes(place)
        axes.set(ylim=(inner, 0), yticks=[], xlim=(0, 1.04 * max(widest(case, found) for case, found in groups)))
        axes.grid(visible=True, axis="x")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("tokens/s, whole training steps, one sequence each")
        top = 0.0
        for case, found in groups:
            bottom = top + space(case, found)
            first = (top + bottom - BAR * len(found)) / 2
            for index, (name, value) in enumerate(found):
                draw_bar(axes, first + BAR * (index + 0.5), name, value, dict(found).get("user's way"))
            if case.limit:
                axes.plot([case.limit] * 2, [top, bottom], color=LIMIT, linewidth=2.2, solid_capstyle="butt")
            note = title(case)
            axes.annotate(note, (0, (top + bottom) / 2), (-10, 0), textcoords="offset points", ha="right", va="center")
            top = bottom + GAP
        heading = f"Training Llama-2-7B on one {machine['device']}"
        figure.text(12 / WIDTH, 1 - 20 / height, heading, size=12, weight="bold")
        labels: dict[Implementation, str] = {"Liger": "with Liger", "longspan": "longspan, times the user's way"}
        drawn = {name for _, found in groups for name, _ in found}
        handles = [Patch(color=COLOURS[name][0], label=labels.get(name, name)) for name in COLOURS if name in drawn]
        handles.append(Line2D([], [], color=LIMIT, linewidth=2.2, label="limit of the machine"))
        where = (8 / WIDTH, 1 - 26 / height)
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=where, ncols=6, frameon=False, handlelength=1.2)
        footer = f"user's way, Liger, Unsloth: full attention · torch {machine['torch']}, "
        footer += f"transformers {machine['transformers']}, peft {machine['peft']}"
        figure.text(1 - RIGHT / WIDTH, 8 / height, footer, color=MUTED, size=8, ha="right")
        figure.savefig(path, dpi=160)


def speed(case: Case, rows: dict[str, Row]) -> float | None:
    return rows[case.name].tokens_per_second if case.name in rows else None


def bars(case: Case, rows: dict[str, Row]) -> list[tuple[Implementation, float]]:
    """(code, tokens/s) of each measured bar, longspan last."""
    cases = {name: case if name == "longspan" else baseline(case, name) for name in COLOURS}
    return [(name, speed(each, rows)) for name, each in cases.items() if each and speed(each, rows)]


def widest(case: Case, found: list[tuple[Implementation, float]]) -> float:
    return max(case.limit or 0, *(value for _, value in found))


def draw_bar(axes: Any, y: float, implementation: Implementation, value: float, users: float | None) -> None:
    colour, ink = COLOURS[implementation]
    axes.barh(y, value, BAR - 2, color=colour)
    times = f"   {value / users:.1f}x" if implementation == "longspan" and users else ""
    axes.annotate(
        f"{value:,.0f}{times}", (value, y), (-5, 0), textcoords="offset points", ha="right", va="center", color=ink,
        size=8.6, weight="bold" if implementation == "longspan" else "normal",
    )  # fmt: skip


def space(case: Case, found: list[tuple[Implementation, float]]) -> float:
    """Points that a case's bars take, or the lines of its title."""
    return max(BAR * len(found), LINE * len(title(case).splitlines()))


def title(case: Case) -> str:
    what = f"S², groups of {case.group_size:,}" if case.group_size else "full attention"
    trains = "\nall weights train" if case.method == "full" else "\nFP8 base" if case.quantization == "fp8" else ""
    offloads = "\nnothing offloaded" if case.offload_activations == 0 else ""
    return f"{case.context_length:,} tokens\n{what}{trains}{offloads}"
