"""The state of a storage root's sweeps, read from its files alone: while they run, and after."""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.records import cancellation
from orchestrator.records.heartbeat import is_alive, read_command
from orchestrator.records.json_files import DamagedFile, expect_fields
from orchestrator.records.leases import is_here
from orchestrator.records.storage import Storage
from orchestrator.records.trial_cost import held_cost, machines_usd, unit_of
from orchestrator.records.trial_folder import parse_trial
from orchestrator.records.trial_record import TrialRecord
from orchestrator.reporting.progress import Progress, Row, progress, seconds_a_token, tokens_left
from workloads.errors import InputError

# A worker on another machine counts as dead after a silence of SILENT_S and of SILENT_STEPS of its steps.
# An evaluation between two steps is silent too.
SILENT_S, SILENT_STEPS = 300.0, 20
# States in which a sweep has nothing left to do for a trial.
ENDED = {"finished", "stopped"}


@dataclass(frozen=True, kw_only=True)
class TrialOverview(Progress):
    """A trial and its cost: ``hours`` for which the sweep held its devices, ``usd`` at the known price."""

    hours: float = 0.0
    usd: float | None = None
    unit: str | None = None


@dataclass(frozen=True, kw_only=True)
class SweepOverview:
    """One sweep.

    Args:
        usd: what its machines have cost so far, whole; the trials have their devices' shares of it.
        runs: its command runs now.
        state: preparing, running, finished, interrupted (its command was killed), unfinished.
        doing: what a command that prepares is doing.
        left_seconds, left_hours: until every trial has ended, at the pace so far, else as planned; None if unknown.
        left_usd: of left_hours, at the price of an hour so far, whole machines included; None if unknown.
    """

    name: str
    state: str
    runs: bool
    host: str | None
    began: float | None
    ended: float | None
    doing: str | None
    trials: list[TrialOverview] = field(default_factory=list)
    unit: str | None = None
    hours: float = 0.0
    usd: float | None = None
    left_seconds: float | None = None
    left_hours: float | None = None
    left_usd: float | None = None

    @property
    def finished(self) -> int:
        """How many trials have ended for this sweep."""
        return sum(trial.state in ENDED for trial in self.trials)


class Overview:
    """All sweeps of a storage root now. It reads each file once: make another to read again."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.now = dataclasses.replace(storage, damaged=[]), time.time()
        self._rows: dict[str, Row | None] = {}
        self._damaged: dict[str, str] = {}
        self._commands: dict[str, dict[str, Any] | None] = {}

    def sweeps(self) -> list[SweepOverview]:
        """All sweeps, the newest first."""
        # A new folder may still be empty.
        names = [name for name in self.storage.sweeps() if self.command(name) or self._listed(name) is not None]
        found = [self.sweep(name) for name in names]
        return sorted(found, key=lambda sweep: sweep.began or 0.0, reverse=True)

    def sweep(self, name: str) -> SweepOverview:
        """One sweep.

        Raises:
            InputError: there is none of this name.
        """
        command, listed = self.command(name), self._listed(name)
        if command is None and listed is None:
            known = ", ".join(self.storage.sweeps()) or "none"
            raise InputError(f"{self.storage.location} has no sweep {name!r}; it has {known}")
        runs = is_alive(command, self.now)
        planned = self._planned(name) if listed else {}
        trials = [self._trial(fingerprint, name, runs, planned.get(fingerprint)) for fingerprint in listed or ()]
        rows = {trial.fingerprint: row for trial in trials if (row := self._row(trial.fingerprint))}
        command = command or {}
        launches = [row.record.launched.time for row in rows.values() if row.record.launched]
        units = {trial.unit for trial in trials if trial.unit}
        hours = sum(trial.hours for trial in trials)
        paid = machines_usd([row.record for row in rows.values()], name) if hours else None
        left = _left(trials, rows, planned, command)
        return SweepOverview(
            name=name,
            state=_state(command, runs, trials),
            runs=runs,
            host=command["owner"]["host"] if command else None,
            began=command.get("began") or min(launches, default=None),
            ended=command.get("ended") or max((t for r in rows.values() if (t := r.record.heard)), default=None),
            doing=command.get("doing") if runs and not trials else None,
            trials=trials,
            unit=units.pop() if len(units) == 1 else None,
            hours=hours,
            usd=paid,
            **left,
            left_usd=paid / hours * left["left_hours"] if paid is not None and left else None,
        )

    def find(self, text: str) -> TrialOverview:
        """A trial by its fingerprint, the first digits of it, or SWEEP/LABEL.

        Raises:
            InputError: there is none, or there are several.
        """
        name, _, label = text.rpartition("/")
        sweeps = [self.sweep(name)] if name else self.sweeps()
        found: dict[str, TrialOverview] = {}
        for each in sweeps:
            for trial in each.trials:
                matches = trial.label == label if name else trial.fingerprint.startswith(text)
                # A running sweep's view of the trial comes first.
                if matches and not (trial.fingerprint in found and found[trial.fingerprint].is_to_do):
                    found[trial.fingerprint] = trial
        if not name and not re.fullmatch(r"[0-9a-f]{4,16}", text):
            found = {}
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            meant = ", ".join(f"{fingerprint} ({trial.label})" for fingerprint, trial in found.items())
            raise InputError(f"{text!r} may mean {meant}; give more digits of the fingerprint")
        at_work = [f"{each.name}/{trial.label} ({trial.fingerprint})" for each in sweeps for trial in each.trials]
        raise InputError(
            f"{self.storage.location} has no trial or sweep {text!r}; expected a sweep's name, SWEEP/LABEL, or 4 or "
            f"more digits of a fingerprint. Trials: {', '.join(at_work[:20]) or 'none'}"
        )

    def command(self, name: str) -> dict[str, Any] | None:
        """The file of the command that runs the sweep, or ran it last."""
        if name not in self._commands:
            self._commands[name] = None
            with self.storage.set_apart():
                self._commands[name] = read_command(self.storage, name)
        return self._commands[name]

    @cached_property
    def running(self) -> dict[str, list[str]]:
        """The trials of each sweep whose command runs now."""
        return {
            name: self._listed(name) or []
            for name in self.storage.sweeps()
            if is_alive(self.command(name), self.now)
        }  # fmt: skip

    def _listed(self, name: str) -> list[str] | None:
        with self.storage.set_apart():
            return self.storage.read_listed(name)
        return None

    def _planned(self, name: str) -> dict[str, dict[str, Any]]:
        """The sweep's plan by fingerprint; of a damaged one nothing."""
        with self.storage.set_apart():
            file = f"sweeps/{name}/plan.json"
            content = self.storage.read(file)
            plan = expect_fields({"trials": []} if content is None else content, file, trials=list)
            each = [expect_fields(entry, file, fingerprint=str, label=str) for entry in plan["trials"]]
            return {entry["fingerprint"]: entry for entry in each}
        return {}

    def _row(self, fingerprint: str) -> Row | None:
        """The trial with its record; None if it was planned and never added, or is damaged."""
        if fingerprint not in self._rows:
            self._rows[fingerprint] = None
            try:
                self._rows[fingerprint] = self._read_row(fingerprint)
            except (DamagedFile, OSError) as error:
                self._damaged[fingerprint] = str(error)
                self.storage.note_damage(str(error))
        return self._rows[fingerprint]

    def _read_row(self, fingerprint: str) -> Row | None:
        folder, file = self.storage.trial(fingerprint), f"trials/{fingerprint}/trial.json"
        values, record = self.storage.read(file), TrialRecord.of(folder.journal)
        self.storage.note_damage(record.damage)
        if values is None and record.heard is None:
            return None
        if values is None:
            raise DamagedFile(f"{self.storage.location}/trials/{fingerprint} has no trial.json")
        return Row(parse_trial(values, f"{self.storage.location}/{file}"), record)

    def _trial(self, fingerprint: str, sweep: str, runs: bool, planned: dict[str, Any] | None) -> TrialOverview:
        row = self._row(fingerprint)
        if row is None:
            label = planned["label"] if planned else fingerprint
            if why := self._damaged.get(fingerprint):
                return TrialOverview(fingerprint=fingerprint, label=label, state="damaged", why=why)
            return TrialOverview(fingerprint=fingerprint, label=label, state="waiting" if runs else "not started")
        record, holder, cancelling = row.record, None, False
        if record.state in ("starting", "running"):
            holder = self.storage.trial(fingerprint).holder()
        if record.state in ("waiting", "starting", "running"):
            cancelling = cancellation.pending_request(self.storage, f"trials/{fingerprint}") is not None
        due = any(fingerprint in trials for trials in self.running.values())
        alive = holder is not None and not self._is_silent(record, holder)
        seen = progress(row, sweep, alive=alive, due=due, holder=holder if alive else None, cancelling=cancelling)
        hours, usd = held_cost(record, sweep)
        unit = unit_of([record]) if record.attempts else None
        return TrialOverview(**dataclasses.asdict(seen), hours=hours, usd=usd, unit=unit)

    def _is_silent(self, record: TrialRecord, holder: dict[str, Any]) -> bool:
        """Whether the holder of a lease, on another machine, seems to be dead."""
        steps = sorted(step.seconds for step in record.steps.values())
        limit = max(SILENT_S, SILENT_STEPS * steps[len(steps) // 2] if steps else 0)
        return not is_here(holder) and self.now - (record.heard or 0) > limit


def _state(command: dict[str, Any], runs: bool, trials: list[TrialOverview]) -> str:
    if runs:
        return "running" if trials else "preparing"
    if trials and all(trial.state in ENDED for trial in trials):
        return "finished"
    killed = command and "ended" not in command
    return "interrupted" if killed or any(trial.state == "interrupted" for trial in trials) else "unfinished"


def _left(
    trials: list[TrialOverview], rows: dict[str, Row], planned: dict[str, Any], command: dict[str, Any]
) -> dict[str, float]:
    """What is left of each trial: at its own pace while it trains, else at the pace of all, else as planned."""
    pace = seconds_a_token(rows.values())
    started = {f: row.record.started for f, row in rows.items() if row.record.started}
    devices = {f: each.devices for f, each in started.items() if each.devices is not None}
    each: list[float] = []
    hours = 0.0
    for trial in trials:
        if trial.state in ENDED:
            continue
        row, plan = rows.get(trial.fingerprint), planned.get(trial.fingerprint, {})
        seconds = trial.seconds_left
        if seconds is None and row and pace is not None:
            seconds = pace * tokens_left(row)
        if seconds is None:
            seconds = plan.get("seconds")  # planned from its step at that time
        if seconds is None:
            return {}
        each.append(seconds)
        hours += seconds * devices.get(trial.fingerprint, max(devices.values(), default=plan.get("workers", 1))) / 3600
    if pace is not None and (to_come := command.get("tokens_to_come")):
        each.append(pace * to_come)
    concurrency = command.get("concurrency") or 1
    return {
        "left_seconds": max(max(each, default=0.0), sum(each) / concurrency),
        "left_hours": hours,
    }
