"""What a sweep has taken, against what it may: ``--budget-hours`` and ``--budget-usd`` while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable

from orchestrator.compare.effort import held
from orchestrator.options import RunOptions
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec

POLL_S = 2.0


class Spending:
    """Hours of devices, and US dollars, that the attempts of one sweep have held, in all runs of its command.

    A context: while it lasts, ``stop`` is called once, with the reason, when the sweep has come to its budget. Dollars
    count where the price of every hour is known.
    """

    def __init__(
        self,
        sweep: str,
        trials: list[TrialSpec],
        storage: Storage,
        options: RunOptions,
        stop: Callable[[str], None],
    ) -> None:
        self.sweep, self.trials, self.storage, self.options, self.stop = sweep, trials, storage, options, stop
        self.records: dict[str, TrialRecord] = {}
        self.exhausted: str | None = None  # the reason, once it is
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="budget", daemon=True)

    def __enter__(self) -> Spending:
        if self.options.budget_hours is not None or self.options.budget_usd is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()

    def so_far(self) -> tuple[float, float | None]:
        """(hours, USD)."""
        hours, usd = 0.0, 0.0
        for trial in list(self.trials):  # a search adds to them
            record = self.records.get(trial.fingerprint)
            if record is None:
                record = self.records[trial.fingerprint] = TrialRecord(self.storage.trial(trial.fingerprint).journal)
            record.follow()
            of_trial, dollars = held(record, self.sweep)
            hours += of_trial
            usd = None if usd is None or dollars is None else usd + dollars
        return hours, usd

    def _watch(self) -> None:
        while not self._end.wait(POLL_S):
            hours, usd = self.so_far()
            for flag, limit, taken in (
                ("--budget-hours", self.options.budget_hours, hours),
                ("--budget-usd", self.options.budget_usd, usd),
            ):
                if limit is not None and taken is not None and taken >= limit:
                    self.exhausted = f"{flag} {limit:g}: {taken:,.4g} are spent"
                    self.stop(self.exhausted)
                    return
