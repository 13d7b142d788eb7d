"""``python -m orchestrator.sweep [RECIPE] [flags]``: plan, run or resume, and compare a sweep.

The same command always continues: finished trials are known by their fingerprint and not trained again, others continue
from their last checkpoint.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from orchestrator.cli import EXIT_FAILED_TRIALS, EXIT_MLFLOW_REFUSED, parse
from orchestrator.planning.cluster import Cluster, is_connected, join_or_start
from orchestrator.planning.plan_table import print_notes, print_plan
from orchestrator.planning.preparation import Checked, Prepared, check_sweep, identify, prepare
from orchestrator.planning.sweep_plan import (
    SweepPlan,
    begin_search,
    plan_sweep,
    refuse_impossible,
    write_plan,
)
from orchestrator.process import (
    BackgroundCall,
    enable_gc,
    exit_without_gc,
    log_libraries_to,
    stop_on_signals,
)
from orchestrator.records import cancellation
from orchestrator.records.heartbeat import Heartbeat, is_alive, read_command
from orchestrator.records.json_files import DamagedFile
from orchestrator.records.mlflow_sync import Tracker, tracking_uri
from orchestrator.records.provenance import Provenance
from orchestrator.reporting.conclusion import Conclusion, failures
from orchestrator.reporting.overview import Overview
from orchestrator.run_options import RunOptions
from orchestrator.running.interruption import describe_kept
from orchestrator.running.sweep_runner import SweepRunner
from orchestrator.spec import SweepSpec
from orchestrator.sweep_file import saved
from orchestrator.terminal import shell_command, shown_path
from workloads.command import EXIT_INTERRUPTED, exit_status
from workloads.errors import InputError
from workloads.files.safe import replace_file
from workloads.terminal import make_console

# A long preparation prints what it is doing this often.
PREPARING_NOTE_SECONDS = 15


@dataclass
class Status:
    """What the command is doing: printed if it takes long, and shown by ``orchestrator.status``."""

    doing: str = "reading the model and the data"
    plan: SweepPlan | None = None

    def report(self, doing: str) -> None:
        """Notes what is being prepared."""
        self.doing = doing

    def adopt(self, plan: SweepPlan) -> None:
        """Notes the plan that is being carried out."""
        self.plan = plan

    def describe(self) -> dict[str, Any]:
        """The fields of ``command.json`` that change."""
        if self.plan is None:
            return {"doing": self.doing}
        return {"doing": None, "concurrency": self.plan.concurrency, "tokens_to_come": self.plan.upcoming_tokens}


def main(arguments: list[str] | None = None, prog: str = "python -m orchestrator.sweep") -> int:
    """Runs the command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: run_sweep(*parse(given, prog), make_console()))


def run_sweep(name: str, spec: SweepSpec, options: RunOptions, console: Console) -> int:
    """Plans, runs or resumes, and compares a sweep; returns the exit status of its command.

    Raises:
        InputError: it cannot run as asked.
        KeyboardInterrupt: with notes on what each trial has kept.
    """
    status, began, connected = Status(), time.monotonic(), is_connected()
    try:
        stop_on_signals()
        sweep = check_sweep(name, spec, options)
        console.print(f"sweep {name}: {status.doing} ...", highlight=False, soft_wrap=True)
        try:
            namesake = _find_running_namesake(sweep)
            with Heartbeat(sweep.storage, sweep.name, status.describe, sweep.spec.digest()):
                return _sweep(sweep, status, namesake, began, console)
        except KeyboardInterrupt as interruption:
            lines = describe_kept(sweep.storage, status.plan.trials if status.plan else ())
            interruption.add_note("\n".join([*lines, "The same command continues from there."]))
            raise
    finally:
        if not connected and (ray := sys.modules.get("ray")):
            ray.shutdown()


def _find_running_namesake(sweep: Checked) -> dict[str, Any] | None:
    """Another command that runs this sweep now: both train its trials, each trial once. None without one.

    Raises:
        InputError: a sweep of this name runs with other settings.
    """
    command = None
    with sweep.storage.set_apart():
        command = read_command(sweep.storage, sweep.name)
    if command is None or not is_alive(command, time.time()):
        return None
    if command.get("settings") not in (None, sweep.spec.digest()):
        raise _name_in_use(sweep, command, "other settings")
    return command


def _name_in_use(sweep: Checked, command: dict[str, Any], what: str) -> InputError:
    owner = command["owner"]
    cancel = shell_command("longspan", "cancel", sweep.name, "--storage", sweep.options.storage)
    return InputError(
        f"a sweep named {sweep.name} is running with {what} (process {owner['pid']} on {owner['host']}); give this one "
        f"another --name, wait for that one, or end it with: {cancel}"
    )


def _sweep(checked: Checked, status: Status, namesake: dict[str, Any] | None, began: float, console: Console) -> int:
    """One sweep, from its checked settings to its report. ``namesake``: another command that runs it."""
    provenance = Provenance.collect()
    options, storage = checked.options, checked.storage
    tracker = Tracker(tracking_uri(storage, options.tracking_uri), options.experiment, storage)
    cancellation.withdraw(storage, f"sweeps/{checked.name}")
    cluster, sweep = _prepare(checked, tracker, status, console)

    plan, search = plan_sweep(sweep, cluster), None
    sweep.check_trials(plan.trials)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    log_libraries_to(sweep.folder / "log.txt")
    if sweep.spec.search != "none":
        search, plan = begin_search(sweep, plan)
    if storage.lists_others(sweep.name, {trial.fingerprint for trial in plan.trials}):
        if namesake:
            raise _name_in_use(sweep, namesake, "other data, or another model, under the same names")
        aside = shown_path(storage.put_aside_sweep(sweep.name))
        console.print(
            f"note: {sweep.name} was the name of a sweep with other trials; its files are kept in {aside}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    replace_file(sweep.folder / "spec.json", saved(sweep.name, sweep.spec, options).encode())
    status.adopt(plan)
    write_plan(sweep, plan)
    print_plan(sweep, plan, console)
    print_notes(sweep, plan, tracker.uri, console)
    refuse_impossible(sweep, plan)
    _put_aside_forced(sweep, plan, console)
    _restore_damaged(sweep, plan, console)

    announced = plan.totals if plan.has_work else None
    if plan.has_work:
        enable_gc()
        plan = SweepRunner(sweep, plan, search, tracker, provenance, console, status.adopt).train()
    else:
        stopped = any(p.action == "stopped" for p in plan.planned)
        ended = "finished, or was stopped early" if stopped else "finished"
        console.print(f"Nothing is left to train: every trial of this sweep is {ended}.")

    outcomes = Conclusion(
        sweep=sweep, plan=plan, began=began, announced=announced, tracker=tracker, provenance=provenance,
        console=console,
    ).conclude()  # fmt: skip
    if sweep.is_cancelled():
        return EXIT_INTERRUPTED
    if failures(outcomes):
        return EXIT_FAILED_TRIALS
    return EXIT_MLFLOW_REFUSED if tracker.refused else 0


def _prepare(checked: Checked, tracker: Tracker, status: Status, console: Console) -> tuple[Cluster, Prepared]:
    """Joins Ray, opens MLflow's store and prepares the data, at the same time."""
    preparing = BackgroundCall(lambda: prepare(identify(checked, status.report), status.report))
    connecting = BackgroundCall(tracker.connect)
    cluster = join_or_start(checked.options)  # Ray needs the main thread for its signals
    stop_on_signals()  # Ray has set its own handler of SIGTERM

    def print_status() -> None:
        console.print(f"{status.doing} ...")

    sweep = preparing.result(PREPARING_NOTE_SECONDS, print_status)
    connecting.result(PREPARING_NOTE_SECONDS, print_status)
    return cluster, sweep


def _put_aside_forced(sweep: Prepared, plan: SweepPlan, console: Console) -> None:
    """Moves the results of trials that --force starts over to a folder of the trial.

    Raises:
        InputError: one is being trained, or is a trial of another running sweep.
    """
    forced = [planned.trial for planned in plan.planned if planned.forced]
    if not forced:
        return
    running = Overview(sweep.storage).running
    for trial in forced:
        others = [name for name, listed in running.items() if trial.fingerprint in listed and name != sweep.name]
        if holder := sweep.storage.trial(trial.fingerprint).holder():
            others.append(holder["sweep"])
        if others:
            raise InputError(
                f"--force: {trial.label} is a trial of {others[0]}, which is running; wait, or cancel it there"
            )
    for trial in forced:
        aside = sweep.storage.trial(trial.fingerprint).put_aside()
        if sweep.rungs:
            sweep.rungs.forget(trial)
        console.print(f"{trial.label}: earlier results are kept in {shown_path(aside)}", soft_wrap=True)


def _restore_damaged(sweep: Prepared, plan: SweepPlan, console: Console) -> None:
    """Writes the trial.json of trials that are not trained again where it is missing or damaged."""
    if sweep.storage.store:
        return
    for trial in (planned.trial for planned in plan.planned if not planned.trains):
        try:
            sweep.storage.trial(trial.fingerprint).read_trial()
        except DamagedFile as error:
            sweep.storage.add_trial(trial, sweep.source.location)
            console.print(f"note: {error}; it is written again", markup=False, soft_wrap=True)


if __name__ == "__main__":
    exit_without_gc(main)
