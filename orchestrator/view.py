"""What a person sees while a sweep runs: one table of all trials, live in a terminal, now and then in a job log."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.journal import TrialRecord
from orchestrator.spec import TrialSpec

REFRESH_S = 1.0
# A job log has no screen to redraw: the table is printed this often.
LOG_INTERVAL_S = 30.0
LOG_WIDTH = 110


@dataclass
class Row:
    trial: TrialSpec
    record: TrialRecord
    known: bool  # it was finished before this sweep began


class LiveView:
    """Follows the journals of a sweep's trials in a thread of its own and shows them."""

    def __init__(self, sweep: str, rows: list[Row], concurrency: int, console: Console) -> None:
        self.sweep = sweep
        self.rows, self.concurrency, self.console = rows, concurrency, console
        self.note = lambda: None  # what a person should know or do, or None
        self.tokens_to_come = lambda: 0  # of trials that a search has not suggested yet: they join the rows later
        self.began = time.time()
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
        printed = time.time()
        while not self._stop.wait(REFRESH_S):
            self._follow()
            if time.time() - printed >= LOG_INTERVAL_S:
                printed = time.time()
                self.console.print(self.table())
                sys.stdout.flush()

    def _follow(self) -> None:
        for row in self.rows:
            row.record.follow()

    def table(self) -> Table:
        elapsed = time.time() - self.began
        left = self.seconds_left()
        title = f"{_duration(elapsed)} elapsed" + (f", about {_duration(left)} left" if left else "")
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, caption=self.note())
        table.add_column("trial", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for name in ("step", "loss", "perplexity", "tokens/s", "time left"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*self.cells(row))
        return table

    def cells(self, row: Row) -> list[str]:
        record, training = row.record, row.trial.training
        curve = record.curve(training.context_length)
        if record.state in ("waiting", "starting"):
            # What it knows is of an earlier attempt, of which this much is kept.
            steps = f"{record.saved_step}/{training.steps}" if training.steps else "-"
            return [row.trial.label, self.state(row), steps, "-", "-", "-", "-"]
        step = record.steps.get(record.last_step)
        running = record.state == "running"
        left = self.trial_seconds_left(row) if running else None
        return [
            row.trial.label,
            self.state(row),
            f"{record.last_step}/{training.steps}" if training.steps else "-",
            f"{step['loss']:.3f}" if step else "-",
            f"{curve[-1]['perplexity']:.3f}" if curve else "-",
            f"{record.tokens_per_second:,.0f}" if step else "-",
            _duration(left) if left is not None else "-",
        ]

    def state(self, row: Row) -> str:
        record = row.record
        if row.known:
            return "known"
        if record.state == "running":
            due = row.trial.training.eval_every
            evaluated = (row.trial.training.context_length, record.last_step) in record.evals
            evaluates = not evaluated and (record.last_step % due == 0 or record.last_step == row.trial.training.steps)
            doing = "evaluating" if evaluates else "training"
            # This sweep waits for another, which has the trial's lease.
            trainer = record.started.get("sweep", self.sweep)
            return doing if trainer == self.sweep else f"{doing}, by {trainer} on {record.started['host']}"
        return record.state

    def trial_seconds_left(self, row: Row) -> float | None:
        """Steps at this trial's pace, with the evaluations that lie between them."""
        record, training = row.record, row.trial.training
        if record.last_step <= record.resumed_at or not record.started:
            return None
        done = record.last_step - record.resumed_at
        pace = (record.steps[record.last_step]["time"] - record.started["time"]) / done
        return max(0.0, pace * (training.steps - record.last_step))

    def seconds_left(self) -> float | None:
        """For all trials: what has run so far tells the seconds a token takes, start-up and evaluation included."""
        spent = tokens = 0.0
        start_ups = [row.record.start_up_seconds for row in self.rows if not row.known and row.record.start_up_seconds]
        for row in self.rows:
            record = row.record
            if not row.known and record.steps and record.started and record.last_step > record.resumed_at:
                last = record.steps[record.last_step]
                spent += last["time"] - record.started["time"]
                tokens += (record.last_step - record.resumed_at) * self._tokens_a_step(row)
        if not tokens:
            return None
        to_do = sum(
            (row.trial.training.steps - row.record.last_step) * self._tokens_a_step(row)
            for row in self.rows
            if row.record.state in ("waiting", "starting", "running")
        )
        waiting = [row for row in self.rows if row.record.state == "waiting"]
        starts = sum(row.trial.training.steps > 0 for row in waiting) + any(not r.trial.training.steps for r in waiting)
        starting = starts * sum(start_ups) / max(1, len(start_ups))
        return (spent / tokens * (to_do + self.tokens_to_come()) + starting) / self.concurrency

    @staticmethod
    def _tokens_a_step(row: Row) -> int:
        return row.trial.training.batch * row.trial.training.context_length


def make_console() -> Console:
    """A console for this terminal, or of fixed width where the output goes to a file or a job log."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=LOG_WIDTH)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
