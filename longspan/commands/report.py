"""``longspan report SWEEP``: the report of a finished sweep, written again from its comparison."""

from __future__ import annotations

from typing import Annotated

import tyro

from orchestrator.records.storage import Storage
from orchestrator.terminal import shown_path
from workloads.command import run_command
from workloads.errors import InputError, unknown
from workloads.terminal import make_console


def write_report(
    sweep: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SWEEP")],
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs",
) -> None:
    """Write a finished sweep's report again, and print its answer and tables. Trains and measures nothing.

    Args:
        sweep: The sweep's name, as status lists it.
        storage: The storage root.
    """
    from dashboards.report import render
    from orchestrator.reporting.result_table import print_comparison

    opened = Storage.at(storage)
    comparison = read_comparison(opened, sweep)
    console = make_console()
    folder = opened.sweep(sweep) / "report"
    render(comparison, folder)
    opened.push(folder)
    print_comparison(comparison, console)
    console.print(f"report: {shown_path(folder / 'report.html')}", soft_wrap=True)


def read_comparison(storage: Storage, sweep: str) -> dict:
    """The comparison that a finished sweep wrote.

    Raises:
        InputError: there is no such sweep, it has not finished, or the file is not what a sweep writes.
    """
    from dashboards.comparison import check

    if sweep not in storage.sweeps():
        raise InputError(f"{unknown('sweep', sweep, storage.sweeps())} in {storage.location}")
    file = f"sweeps/{sweep}/comparison.json"
    content = storage.read(file)
    if content is None:
        raise InputError(f"the sweep {sweep} has no comparison yet: it has not finished. The same command resumes it")
    try:
        return check(content)
    except ValueError as error:
        raise InputError(f"{storage.location}/{file}: {error}. The sweep's command writes it again") from error


def main(arguments: list[str] | None = None, prog: str = "longspan report") -> int:
    """Runs the command; returns its exit status."""
    return run_command(write_report, prog, arguments)
