"""``python -m orchestrator.compare RUN RUN ...``: what differs between runs, and which is better."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from orchestrator.compare.runs import find_run
from orchestrator.compare.side_by_side import side_by_side
from orchestrator.compare.words import dollars, hours
from orchestrator.records.storage import Storage
from workloads.command import exit_status
from workloads.errors import InputError
from workloads.files.json_text import json_text
from workloads.terminal import make_console


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's arguments."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN RUN ...")]]
    """Two runs or more; the others are compared with the first. Each is a trial's folder, its fingerprint or the
    beginning of it; SWEEP/LABEL such as 'convergence/lora+ 2048', or an MLflow run id."""
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "./runs"
    """Storage root that holds the trials."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print everything as JSON."""


def main(arguments: list[str] | None = None, prog: str = "python -m orchestrator.compare") -> int:
    """Runs the command; returns its exit status."""
    return exit_status(lambda: _compare(arguments, prog))


def _compare(arguments: list[str] | None, prog: str) -> None:
    options = tyro.cli(
        Options,
        prog=prog,
        description="Show what differs between runs, and which of them is better.",
        args=arguments,
    )
    compared = side_by_side(_find(options))
    if options.json:
        print(json_text(compared, indent=1))
    else:
        show(compared, make_console())


def _find(options: Options) -> list[Any]:
    if len(options.runs) < 2:
        given = f"only {options.runs[0]!r} is given" if options.runs else "no run is given"
        raise InputError(f"{given}; expected at least two runs to compare")
    storage = Storage.at(options.storage)
    if storage.store:
        raise InputError(
            f"--storage {options.storage}: runs are compared in a local folder; bring them here with python -m "
            "orchestrator.fetch, and give the folders that it prints"
        )
    runs = [find_run(text, storage) for text in options.runs]
    for place, run in enumerate(runs):
        for text, other in zip(options.runs, runs[:place]):
            if run.folder == other.folder:
                raise InputError(f"{text!r} and {options.runs[place]!r} are the same run, {run.name}")
    return runs


def show(compared: dict[str, Any], console: Console) -> None:
    """Print the differences, curves and verdict."""
    letters = [chr(ord("A") + place) if place < 26 else str(place) for place in range(len(compared["runs"]))]
    for letter, run in zip(letters, compared["runs"]):
        spent = f", {hours(run['hours'], run['hours_unit'])}" if run["hours"] is not None else ""
        spent += f", {dollars(run['usd'])}" if run["usd"] is not None else ""
        steps = f", step {run['steps']} of {run['of_steps']}" if run["of_steps"] else ""
        console.print(f"{letter}  {run['name']}: {run['state']}{steps}{spent}")
    if compared["differences"]:
        table = Table(title="\nWhat differs", title_justify="left", box=None, pad_edge=False)
        for name in ("", "field", *letters):
            table.add_column(name, overflow="fold")
        section = None
        for one in compared["differences"]:
            heading, section = ("" if one["section"] == section else one["section"]), one["section"]
            table.add_row(heading, one["field"], *("-" if v is None else str(v) for v in one["values"]))
        console.print(table)
    else:
        console.print("\nNo recorded field differs.")
    same = ", ".join(f"{count} of {section}" for section, count in compared["same"].items() if count)
    console.print(f"The same: {same}.")
    table = Table(title="\nPerplexity", title_justify="left", box=None, pad_edge=False)
    for name in ("step", *letters, *(f"{letter} above {letters[0]}" for letter in letters[1:])):
        table.add_column(name, justify="right")
    for row in compared["curve"]:
        perplexities = ("-" if value is None else f"{value:.3f}" for value in row["perplexity"])
        gaps = (
            "-" if gap is None
            else f"{gap['percent']:+.2f}%" if gap["low"] is None
            else f"{gap['percent']:+.2f}% ({gap['low']:+.2f}% to {gap['high']:+.2f}%)"
            for gap in row["gaps"]
        )  # fmt: skip
        table.add_row(f"{row['step']:,}", *perplexities, *gaps)
    console.print(table)
    for sentence in compared["verdict"]:
        console.print(sentence)


if __name__ == "__main__":
    sys.exit(main())
