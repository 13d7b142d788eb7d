"""What a running sweep has spent of its budget: ``--budget-hours`` and ``--budget-usd``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.records.storage import Storage
from orchestrator.records.trial_cost import held_cost, machines_usd
from orchestrator.records.trial_record import TrialRecord
from orchestrator.run_options import RunOptions
from orchestrator.trial_spec import TrialSpec

logger = logging.getLogger(__name__)
POLL_S = 2.0


class Spending:
    """Device hours and US dollars spent by the attempts of one sweep, over all runs of its command."""

    def __init__(self, sweep: str, storage: Storage) -> None:
        self.sweep, self.storage = sweep, storage
        self.records: dict[str, TrialRecord] = {}

    def so_far(self, trials: Sequence[TrialSpec]) -> tuple[float, float | None]:
        """(device hours, USD of whole machines); USD is None where the price of an hour is unknown."""
        hours = 0.0
        for trial in (trials := list(trials)):
            record = self.records.get(trial.fingerprint)
            if record is None:
                record = self.records[trial.fingerprint] = TrialRecord(self.storage.trial(trial.fingerprint).journal)
            try:
                record.follow()
            except Exception as error:  # an unreadable journal must not hide what the other trials spend
                logger.warning("%s cannot be read now, its last known hours count: %r", record.journal.location, error)
            hours += held_cost(record, self.sweep)[0]
        return hours, machines_usd([self.records[trial.fingerprint] for trial in trials], self.sweep)


class BudgetWatch:
    """A context that calls ``stop`` once, with the reason, when the sweep has exhausted its budget.

    Args:
        trials: the sweep's; a search may add to them.
    """

    def __init__(
        self, spending: Spending, trials: Sequence[TrialSpec], options: RunOptions, stop: Callable[[str], None]
    ) -> None:
        self.spending, self.trials, self.options, self.stop = spending, trials, options, stop
        self.exhausted: str | None = None  # the reason, once it is
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="budget", daemon=True)

    def __enter__(self) -> BudgetWatch:
        if self.options.budget_hours is not None or self.options.budget_usd is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()

    def _watch(self) -> None:
        while not self._end.wait(POLL_S):
            try:
                self.exhausted = self._find_exhausted()
                if self.exhausted:
                    self.stop(self.exhausted)
                    return
            except Exception as error:  # the storage may be unreachable, and the next look succeed
                logger.warning("the budget cannot be checked or enforced now: %r", error)

    def _find_exhausted(self) -> str | None:
        hours, usd = self.spending.so_far(self.trials)
        for flag, limit, spent in (
            ("--budget-hours", self.options.budget_hours, hours),
            ("--budget-usd", self.options.budget_usd, usd),
        ):
            if limit is not None and spent is not None and spent >= limit:
                return f"{flag} {limit:g}: {spent:,.4g} spent"
        return None
