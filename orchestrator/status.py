"""``python -m orchestrator.status [SWEEP]``: what is running and waiting, and what it has cost and will cost.

For another terminal, during a sweep and after it. It reads only files (and asks the NVIDIA driver), and does not join
Ray: it works on any machine that sees the storage root.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Annotated, Any

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.gpus import Gpu, gpus
from orchestrator.records.storage import Storage
from orchestrator.reporting.disk_usage import DiskUsage, disk_usage
from orchestrator.reporting.live_view import numbers, trials_table
from orchestrator.reporting.overview import Overview, SweepOverview, TrialOverview
from orchestrator.reporting.progress import AT_WORK
from orchestrator.terminal import device_hours, duration, file_size, first_of, usd
from workloads.command import run_command
from workloads.files.json_text import json_text
from workloads.terminal import make_console

WATCH_S = 2.0
# From this width on, a trial is one line; below it, the other facts follow the table.
WIDE = 110
LOG_WIDTH = 120
# Of several trials with the same facts, at most this many are named.
LABELS = 4
STYLES = {
    "damaged": "red",
    "interrupted": "yellow",
    "failed": "red",
    "cancelled": "yellow",
    "finished": "dim",
    "not started": "dim",
}


def show(
    sweep: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="SWEEP")] = None,
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs",
    watch: bool = False,
    json: bool = False,
    disk: bool = False,
) -> None:
    """Show what is running and waiting, and what it has cost and will cost. Reads only files.

    Args:
        sweep: Name of a sweep to show; by default all of them, the newest in detail.
        storage: The storage root.
        watch: Refresh every two seconds, until nothing runs.
        json: Print JSON.
        disk: Show the disk usage of each trial and of the rest of the storage root.
    """
    console = make_console(LOG_WIDTH)
    opened = Storage.existing(storage)
    if disk:
        usage, overview = disk_usage(opened), Overview(opened)
        if json:
            _print_json(dataclasses.asdict(usage))
        else:
            console.print(disk_table(usage, overview))
    elif json:
        _print_json(as_json(Overview(opened), sweep))
    elif watch:
        _watch(opened, sweep, console)
    else:
        console.print(status(Overview(opened), sweep, console.width))


def _print_json(content: Any) -> None:
    print(json_text(content, indent=1))


def as_json(overview: Overview, sweep: str | None = None) -> dict[str, Any]:
    """All sweeps, or one, and the GPUs of this machine as plain data."""
    sweeps = overview.sweeps() if sweep is None else [overview.sweep(sweep)]
    return {
        "sweeps": [dataclasses.asdict(each) for each in sweeps],
        "damaged": overview.storage.damaged,
        "gpus": [dataclasses.asdict(gpu) for gpu in gpus()],
    }


def _watch(storage: Storage, sweep: str | None, console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            overview = Overview(storage)
            live.update(status(overview, sweep, console.width), refresh=True)
            if sweep not in overview.running if sweep else not overview.running:
                return
            time.sleep(WATCH_S)


def status(overview: Overview, sweep: str | None, width: int) -> Group:
    """All sweeps with the newest in detail, or one sweep; then what is damaged, and the GPUs."""
    if sweep is not None:
        lines: list[Text | Table] = sweep_lines(overview.sweep(sweep), overview.now, width)
    elif sweeps := overview.sweeps():
        lines = [sweeps_table(sweeps, overview.now), Text(), *sweep_lines(sweeps[0], overview.now, width)]
    else:
        lines = [Text(f"{overview.storage.location} has no sweeps yet.")]
    damaged = [Text(f"damaged: {what}", style="yellow") for what in overview.storage.damaged]
    return Group(*lines, *damaged, *gpu_lines(gpus()))


def sweeps_table(sweeps: list[SweepOverview], now: float) -> Table:
    """A row for each sweep."""
    table = Table(box=None, pad_edge=False)
    table.add_column("sweep", overflow="fold")
    for name in ("state", "ended"):
        table.add_column(name, no_wrap=True)
    for name in ("spent", "left", "started"):
        table.add_column(name, justify="right", no_wrap=True)
    for sweep in sweeps:
        table.add_row(
            sweep.name,
            sweep.state,
            f"{sweep.finished} of {len(sweep.trials)}",
            device_hours(sweep.hours, sweep.unit),
            "-" if not sweep.left_seconds else duration(sweep.left_seconds),
            "-" if sweep.began is None else f"{duration(now - sweep.began)} ago",
        )
    return table


def sweep_lines(sweep: SweepOverview, now: float, width: int) -> list[Text | Table]:
    """One sweep in detail."""
    when = ""
    if sweep.runs and sweep.began:
        when = f" on {sweep.host} for {duration(now - sweep.began)}"
    elif sweep.ended:
        when = f" {duration(now - sweep.ended)} ago"
    doing = f": {sweep.doing}" if sweep.doing else f"; {sweep.finished} of {len(sweep.trials)} trials have ended"
    lines: list[Text | Table] = [Text(f"{sweep.name}: {sweep.state}{when}{doing}", style="bold")]
    if sweep.trials:
        lines += [Text(_money(sweep)), trial_rows(sweep.trials, now, width)]
        lines += [Text(line) for line in more_on(sweep.trials, now, wide=width >= WIDE)]
    return lines


def _money(sweep: SweepOverview) -> str:
    spent = f"spent {_cost(sweep.hours, sweep.unit, sweep.usd)}"
    if sweep.left_hours is None:
        return f"{spent}; time left not known yet"
    if not sweep.left_hours:
        return spent
    left = _cost(sweep.left_hours, sweep.unit, sweep.left_usd)
    when = duration(sweep.left_seconds or 0.0)
    return f"{spent}; about {left} left, {when}{'' if sweep.runs else ' once resumed'}"


def _cost(hours: float, unit: str | None, money: float | None) -> str:
    return device_hours(hours, unit) + ("" if money is None else f" ({usd(money)})")


def trial_rows(trials: list[TrialOverview], now: float, width: int) -> Table:
    """The live table; if wide enough, also the attempts, last checkpoint, last update and host."""
    table = trials_table()
    wide = width >= WIDE
    if wide:
        for name in ("attempts", "saved", "updated"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("host", overflow="ellipsis", no_wrap=True)
    for trial in trials:
        more = [str(trial.attempts or "-"), str(trial.saved_step or "-"), _heard(trial, now), trial.host or "-"]
        table.add_row(trial.label, trial.state, *numbers(trial), *(more if wide else []), style=STYLES.get(trial.state))
    if not wide:
        table.padding = (0, 1, 0, 0)
    return table


def _heard(trial: TrialOverview, now: float) -> str:
    return "-" if trial.heard is None else f"{duration(max(0.0, now - trial.heard))} ago"


def more_on(trials: list[TrialOverview], now: float, wide: bool) -> list[str]:
    """The facts that do not fit into the rows; trials with the same facts share a line."""
    alike: dict[tuple[str, str], list[str]] = {}
    for trial in trials:
        if facts := _facts(trial, now, wide):
            alike.setdefault((trial.state, "; ".join(facts)), []).append(trial.label)
    return [f"  {first_of(labels, LABELS)} {state}: {facts}" for (state, facts), labels in alike.items()]


def _facts(trial: TrialOverview, now: float, wide: bool) -> list[str]:
    facts = []
    if not wide and trial.state in AT_WORK | {"interrupted"} and trial.attempts:
        saved = f"saved at {trial.saved_step}" if trial.saved_step else "no checkpoint"
        attempts = f"{trial.attempts} attempt{'s' * (trial.attempts > 1)}"
        facts.append(f"on {trial.host}, {attempts}, {saved}, updated {_heard(trial, now)}")
    facts += [fact for fact in (trial.elsewhere, trial.why) if fact]
    return facts + [remedy for remedy in trial.remedies if not (trial.why or "").startswith(remedy)]


def gpu_lines(found: list[Gpu]) -> list[Text]:
    """A line for each GPU of this machine, under a heading."""
    return [Text("GPUs of this machine:"), *(Text(f"  {gpu}") for gpu in found)] if found else []


def disk_table(usage: DiskUsage, overview: Overview) -> Table:
    """Disk usage by trial, the largest first, and of the rest."""
    labels = {trial.fingerprint: f"{sweep.name}/{trial.label}" for sweep in overview.sweeps() for trial in sweep.trials}
    table = Table(box=None, pad_edge=False, caption=f"{file_size(usage.total)} in total", caption_justify="left")
    table.add_column("item", overflow="fold")
    for name in ("checkpoints", "earlier", "rest", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in sorted(usage.trials.values(), key=lambda trial: trial.total, reverse=True):
        table.add_row(
            f"trials/{trial.fingerprint} {labels.get(trial.fingerprint, '')}",
            f"{trial.num_checkpoints}: {file_size(trial.checkpoints)}" if trial.num_checkpoints else "-",
            file_size(trial.earlier) if trial.earlier else "-",
            file_size(trial.rest),
            file_size(trial.total),
        )
    others = {f"data/{name}": size for name, size in usage.data.items()} | {"mlflow": usage.mlflow, "rest": usage.rest}
    for name, size in others.items():
        table.add_row(name, "-", "-", "-", file_size(size))
    return table


def main(arguments: list[str] | None = None, prog: str = "python -m orchestrator.status") -> int:
    """Runs the command; returns its exit status."""
    return run_command(show, prog, arguments)


if __name__ == "__main__":
    sys.exit(main())
