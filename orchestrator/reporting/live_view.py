"""The table of all trials while a sweep runs: live in a terminal, one line a minute in a job log."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.reporting.progress import AT_WORK, Progress, Row, progress, progress_line, seconds_left
from orchestrator.terminal import duration, number_or_dash

REFRESH_S = 1.0
# A job log has no screen to redraw: it gets one line this often.
LOG_INTERVAL_S = 60.0
# Lines of the screen that are not trials: title, header, caption.
OTHER_LINES = 5


class LiveView:
    """Follows the journals of a sweep's trials in its own thread and shows them."""

    def __init__(self, sweep: str, rows: list[Row], concurrency: int, console: Console) -> None:
        self.sweep = sweep
        self.rows, self.concurrency, self.console = rows, concurrency, console
        self.note: Callable[[], str | None] = lambda: None  # what a person should know or do
        self.tokens_to_come = lambda: 0  # of trials that a search has not suggested yet: they join the rows later
        self.began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)

    def __enter__(self) -> LiveView:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if self.console.is_terminal:
            with Live(self.table(), console=self.console, auto_refresh=False, transient=True) as live:
                while not self._stop.wait(REFRESH_S):
                    self._follow()
                    live.update(self.table(), refresh=True)
            return
        printed = time.monotonic()
        while not self._stop.wait(REFRESH_S):
            self._follow()
            if time.monotonic() - printed >= LOG_INTERVAL_S:
                printed = time.monotonic()
                self._log()
                sys.stdout.flush()

    def _follow(self) -> None:
        for row in self.rows:
            row.record.follow()

    def _log(self) -> None:
        trials = [progress(row, self.sweep) for row in self.rows]
        for line in filter(None, [progress_line(trials, *self._times()), self.note()]):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _times(self) -> tuple[float, float | None]:
        """Seconds since the view began, and about how many are left."""
        left = seconds_left(self.rows, self.concurrency, self.tokens_to_come())
        return time.monotonic() - self.began, left

    def table(self) -> Table:
        """The table as of now."""
        elapsed, left = self._times()
        title = f"{duration(elapsed)} elapsed" + (f", about {duration(left)} left" if left else "")
        table = trials_table(title)
        trials = [progress(row, self.sweep) for row in self.rows]
        room = self.console.height - OTHER_LINES if self.console.is_terminal else len(trials)
        shown = most_active(trials, room)
        others = Counter(trial.state for trial in trials) - Counter(trial.state for trial in shown)
        more = [f"and {', '.join(f'{n} {state}' for state, n in others.items())}"] if others else []
        table.caption = "\n".join([*more, *filter(None, [self.note()])]) or None
        for trial in shown:
            elsewhere = f", {trial.elsewhere}" if trial.elsewhere else ""
            table.add_row(trial.label, trial.state + elsewhere, *numbers(trial))
        return table


def most_active(trials: list[Progress], room: int) -> list[Progress]:
    """As many trials as a screen has room for, in their order: those at work first, then those that wait."""
    ranks = {trial.fingerprint: 0 if trial.state in AT_WORK else 1 if trial.is_to_do else 2 for trial in trials}
    chosen = sorted(trials, key=lambda trial: ranks[trial.fingerprint])[: max(1, room)]
    return [trial for trial in trials if trial in chosen]


def trials_table(title: str | None = None) -> Table:
    """A table with columns for a trial's label, its state and its :func:`numbers`."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "perplexity", "tokens/s", "time left"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def numbers(trial: Progress) -> list[str]:
    """The cells of a trial's row from the third on."""
    return [
        f"{trial.step}/{trial.steps}" if trial.steps else "-",
        number_or_dash(trial.loss, ".3f"),
        number_or_dash(trial.perplexity, ".3f"),
        number_or_dash(trial.tokens_per_second, ",.0f"),
        "-" if trial.seconds_left is None else duration(trial.seconds_left),
    ]
