"""``python -m orchestrator.status [SWEEP]``: what runs, what waits for what, what it took and will take.

From another terminal, while a sweep runs and after. It reads files alone (and asks nvidia-smi): no Ray is joined, so
that it works beside any sweep that uses the same storage root, on any machine that sees it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Annotated, Any

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.records.storage import Storage
from orchestrator.reporting.disk_usage import DiskUsage, disk_usage, in_words
from orchestrator.reporting.gpus import Gpu, gpus
from orchestrator.reporting.live_view import numbers, trials_table
from orchestrator.reporting.overview import Overview, SweepOverview, TrialOverview
from orchestrator.reporting.progress import AT_WORK
from orchestrator.terminal import duration
from workloads.command import run_command
from workloads.errors import InputError

WATCH_S = 2.0
# From this width on a trial is one line; below, what is not in its row follows the table.
WIDE = 110
LOG_WIDTH = 120
# Of several trials of which the same is to be said, so many are named.
LABELS = 4
STYLES = {"interrupted": "yellow", "failed": "red", "cancelled": "yellow", "finished": "dim", "not begun": "dim"}


def main(
    sweep: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="SWEEP")] = None,
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs",
    watch: bool = False,
    json: bool = False,
    disk: bool = False,
) -> None:
    """What runs, what waits for what, what it has taken and will take; reads files alone.

    Args:
        sweep: A sweep's name, to show it alone; without it all of the storage root, and the newest in detail.
        storage: The storage root.
        watch: Show it again every two seconds, until nothing runs any more.
        json: Print it as JSON.
        disk: What each trial takes on the disk, and the rest of the storage root.
    """
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, markup=False, width=LOG_WIDTH)
    opened = Storage.at(storage)
    if opened.store is None and not opened.root.is_dir():
        raise InputError(f"there is no storage root {opened.root}; name one with --storage")
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
    print(json.dumps(content, indent=1))


def as_json(overview: Overview, sweep: str | None = None) -> dict[str, Any]:
    sweeps = overview.sweeps() if sweep is None else [overview.sweep(sweep)]
    return {
        "sweeps": [dataclasses.asdict(each) for each in sweeps],
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
    """All sweeps and the newest of them, or one."""
    if sweep is not None:
        return Group(*sweep_lines(overview.sweep(sweep), overview.now, width), *gpu_lines(gpus()))
    sweeps = overview.sweeps()
    if not sweeps:
        return Group(Text(f"{overview.storage.location} has no sweeps yet."))
    return Group(
        sweeps_table(sweeps, overview.now), Text(), *sweep_lines(sweeps[0], overview.now, width), *gpu_lines(gpus())
    )


def sweeps_table(sweeps: list[SweepOverview], now: float) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("sweep", overflow="fold")
    for name in ("state", "ended"):
        table.add_column(name, no_wrap=True)
    for name in ("spent", "left", "begun"):
        table.add_column(name, justify="right", no_wrap=True)
    for sweep in sweeps:
        table.add_row(
            sweep.name,
            sweep.state,
            f"{sweep.finished} of {len(sweep.trials)}",
            _hours(sweep.hours, sweep.unit),
            "-" if not sweep.left_seconds else duration(sweep.left_seconds),
            "-" if sweep.began is None else f"{duration(now - sweep.began)} ago",
        )
    return table


def sweep_lines(sweep: SweepOverview, now: float, width: int) -> list[Text | Table]:
    """One sweep in detail."""
    when = ""
    if sweep.runs:
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
    spent = f"spent {_hours(sweep.hours, sweep.unit)}{_usd(sweep.usd)}"
    if sweep.left_hours is None:
        return f"{spent}; how long it will take is not known yet"
    if not sweep.left_hours:
        return spent
    left = f"{_hours(sweep.left_hours, sweep.unit)}{_usd(sweep.left_usd)}"
    return f"{spent}; about {left} left, {duration(sweep.left_seconds)}{'' if sweep.runs else ' if it goes on'}"


def _hours(hours: float, unit: str | None) -> str:
    return f"{hours:,.2f} {unit or 'hours'}" if hours >= 0.1 else f"{hours:.4f} {unit or 'hours'}"


def _usd(usd: float | None) -> str:
    return "" if usd is None else f" ({usd:,.2f} USD)"


def trial_rows(trials: list[TrialOverview], now: float, width: int) -> Table:
    """The live table, and where there is room where a trial runs and what is kept of it."""
    table = trials_table()
    wide = width >= WIDE
    if wide:
        for name in ("tries", "saved", "heard"):
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
    """What does not fit into the trials' rows; what is the same of several is said once."""
    alike: dict[tuple[str, str], list[str]] = {}
    for trial in trials:
        if facts := _facts(trial, now, wide):
            alike.setdefault((trial.state, "; ".join(facts)), []).append(trial.label)
    return [f"  {_and(labels)} {state}: {facts}" for (state, facts), labels in alike.items()]


def _and(labels: list[str]) -> str:
    more = f" and {len(labels) - LABELS} more" if len(labels) > LABELS else ""
    return ", ".join(labels[:LABELS]) + more


def _facts(trial: TrialOverview, now: float, wide: bool) -> list[str]:
    facts = []
    if not wide and trial.state in AT_WORK | {"interrupted"} and trial.attempts:
        saved = f"saved at {trial.saved_step}" if trial.saved_step else "nothing saved"
        tries = f"{trial.attempts} {'try' if trial.attempts == 1 else 'tries'}"
        facts.append(f"on {trial.host}, {tries}, {saved}, heard {_heard(trial, now)}")
    facts += [fact for fact in (trial.elsewhere, trial.why) if fact]
    return facts + [remedy for remedy in trial.remedies if not (trial.why or "").startswith(remedy)]


def gpu_lines(found: list[Gpu]) -> list[Text]:
    return [Text("GPUs of this machine:"), *(Text(f"  {gpu}") for gpu in found)] if found else []


def disk_table(usage: DiskUsage, overview: Overview) -> Table:
    """The largest first."""
    labels = {trial.fingerprint: f"{sweep.name}/{trial.label}" for sweep in overview.sweeps() for trial in sweep.trials}
    table = Table(box=None, pad_edge=False, caption=f"{in_words(usage.total)} in all", caption_justify="left")
    table.add_column("what", overflow="fold")
    for name in ("checkpoints", "earlier", "rest", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in sorted(usage.trials.values(), key=lambda trial: trial.total, reverse=True):
        table.add_row(
            f"trials/{trial.fingerprint} {labels.get(trial.fingerprint, '')}",
            f"{trial.num_checkpoints}: {in_words(trial.checkpoints)}" if trial.num_checkpoints else "-",
            in_words(trial.earlier) if trial.earlier else "-",
            in_words(trial.rest),
            in_words(trial.total),
        )
    others = {f"data/{name}": size for name, size in usage.data.items()} | {"mlflow": usage.mlflow, "rest": usage.rest}
    for name, size in others.items():
        table.add_row(name, "-", "-", "-", in_words(size))
    return table


if __name__ == "__main__":
    sys.exit(run_command(main, "orchestrator.status"))
