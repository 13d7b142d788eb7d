"""A comparison as one page and its pictures: `python -m dashboards.report COMPARISON.json [--out FOLDER]`.

The page is one self-contained file: it opens from disk, offline, in light and dark, on a phone and on paper. The answer
is the headline; then the picture that shows it, what to do next, further figures, tables, and how it was measured.
"""

import argparse
import json
import sys
from pathlib import Path

from dashboards import figures, numbers
from dashboards.comparison import check


def render(comparison: dict, folder: Path) -> list[Path]:
    """Write report.html and the PNG figures into `folder`, and return their paths.

    Raises:
        ValueError: `comparison` does not have the shape that dashboards.comparison describes.
    """
    comparison = check(comparison)
    if not comparison["contexts"]:
        raise ValueError("comparison.contexts is empty: there is nothing to draw")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(html(comparison), encoding="utf-8")
    return [page, *(figures.write_png(comparison, name, folder / f"{name}.png") for name in figures.of(comparison))]


def html(comparison: dict) -> str:
    """The page, from a checked comparison."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = ("count", "dollars", "duration", "gibibytes", "hours", "moment", "percent", "perplexity", "small")
    environment.filters |= {name: getattr(numbers, name) for name in filters}
    environment.filters["method"] = lambda name: comparison["method_labels"].get(name, name)
    environment.filters["variant"] = lambda name: comparison["variant_labels"].get(name, name)
    trials = [(context, trial) for context in comparison["contexts"] for trial in context["trials"]]
    looks = figures.styles(comparison)
    return environment.get_template("report.html").render(
        comparison | {"headline": comparison["headline"] or comparison["sentences"]},
        figures={
            name: (figures.title(comparison, name), figures.svg_panels(comparison, name))
            for name in figures.of(comparison)
        },
        colours=list(looks.values()),
        colour_of={name: f"var(--method-{index})" for index, name in enumerate(looks)},
        baseline=_baseline(comparison),
        means=_means,
        interval=lambda point: numbers.interval(point["low"], point["high"]),
        troubled=[(context, trial) for context, trial in trials if trial["state"] not in ("finished", "stopped")],
        stopped=[(context, trial) for context, trial in trials if trial["state"] == "stopped"],
        trials=trials,
    )


def _baseline(comparison: dict) -> str:
    """What gaps are to, in few words: full, unless another baseline was requested or nothing full was trained."""
    if comparison["baseline"]:
        return "baseline"
    methods = {trial["method"] for context in comparison["contexts"] for trial in context["trials"]}
    return "full" if "full" in methods else "the best"


def _means(context: dict) -> dict[str, dict]:
    """Settings with several seeds, by the fingerprint of the last of their trials: a row of means follows it."""
    found = {}
    for setting in context["settings"]:
        of_setting = [
            trial
            for trial in context["trials"]
            if trial["final"]
            and (trial["variant"], trial["learning_rate"]) == (setting["variant"], setting["learning_rate"])
            and trial["seed"] in setting["seeds"]
        ]
        if len(setting["seeds"]) > 1 and of_setting:
            found[of_setting[-1]["fingerprint"]] = setting
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m dashboards.report", description="Draw a sweep's comparison.")
    parser.add_argument("comparison", type=Path, help="the comparison.json that a sweep wrote")
    parser.add_argument("--out", type=Path, help="where to write (default: the comparison's folder)")
    options = parser.parse_args(arguments)
    try:
        paths = render(
            json.loads(options.comparison.read_text(encoding="utf-8")), options.out or options.comparison.parent
        )
    except OSError as error:
        print(f"dashboards.report: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        shown = str(error).encode("unicode_escape").decode()  # it may quote the file
        print(f"dashboards.report: {options.comparison}: {shown}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
