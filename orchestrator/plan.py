"""What a sweep would do with each of its trials, and why, and what that takes: before anything is trained.

``python -m orchestrator.plan [RECIPE] [flags]`` prints it and starts nothing; ``--cluster`` plans for
one of the files in ``clusters/`` instead of for this machine (or the Ray cluster at ``--address``), without touching
it.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from orchestrator.options import RunOptions
from orchestrator.planning.cluster import Cluster, join_or_start
from orchestrator.planning.estimate import GIB, Estimate, Estimator, makespan
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.terminal import duration, number_or_dash
from orchestrator.trial_spec import TrialSpec
from workloads.command import EXIT_USER_ERROR
from workloads.errors import InputError

Action = Literal["run", "resume", "known", "stopped", "cannot"]


@dataclass(frozen=True)
class Planned:
    trial: TrialSpec
    record: TrialRecord
    action: Action
    reason: str
    estimate: Estimate | None = None
    forced: bool = False  # what there is of it is put aside before

    @property
    def trains(self) -> bool:
        return self.action in ("run", "resume")


def plan(
    trials: list[TrialSpec],
    storage: Storage,
    estimator: Estimator | None = None,
    fit: bool = False,
    stopping: str | None = None,
    forced: Collection[str] = (),
) -> list[Planned]:
    """Each trial with what is to be done about it, from what its journal says, and what that takes.

    Args:
        fit: a trial that does not fit into memory is changed so that it does.
        stopping: the name of a sweep that stops trials early. Those that it has stopped before stay so; to any other
            sweep they are unfinished.
        forced: fingerprints of trials that begin anew, whatever is known of them.
    """
    records = [TrialRecord.of(storage.trial(trial.fingerprint).journal) for trial in trials]
    if estimator:
        estimator.learn([*zip(trials, records), *storage.others(trials)])
    return [
        _force(trial, record, estimator, fit)
        if trial.fingerprint in forced and record.journal.exists()
        else _plan(trial, record, estimator, fit, stopping)
        for trial, record in zip(trials, records)
    ]


def _force(trial: TrialSpec, record: TrialRecord, estimator: Estimator | None, fit: bool) -> Planned:
    planned = _plan(trial, TrialRecord(record.journal), estimator, fit, None)
    if planned.action == "cannot":
        return planned
    done = f"{record.state} at step {record.last_step}" if record.steps else record.state
    reason = f"from the beginning (--force); what is {done} is put aside"
    return dataclasses.replace(planned, reason=reason, forced=True)


def _plan(
    trial: TrialSpec, record: TrialRecord, estimator: Estimator | None, fit: bool, stopping: str | None
) -> Planned:
    estimate = estimator.of(trial, record, fit) if estimator else None
    if record.state == "finished":
        return Planned(trial, record, "known", f"finished before, in trials/{trial.fingerprint}", estimate)
    if record.state == "stopped" and record.stopped.sweep == stopping:
        reason = f"stopped early at step {record.stopped.step}: {record.reason}"
        return Planned(trial, record, "stopped", reason, estimate)
    if estimate and estimate.refusal:
        return Planned(trial, record, "cannot", estimate.refusal, estimate)
    changed = f"; with {', '.join(estimate.changes)} so that it fits" if estimate and estimate.changes else ""
    if record.saved_step:
        reason = f"from step {record.saved_step} of {trial.training.steps}"
        if record.state == "cancelled":
            reason += f", where it was cancelled {record.reason}"
        return Planned(trial, record, "resume", reason + changed, estimate)
    if record.state == "failed":
        return Planned(trial, record, "run", f"failed before ({record.reason}), tried again" + changed, estimate)
    if record.state == "cancelled":
        return Planned(trial, record, "run", f"cancelled before {record.reason}" + changed, estimate)
    reason = "not trained yet" if trial.training.steps else "not evaluated yet"
    return Planned(trial, record, "run", reason + changed, estimate)


def summary(planned: list[Planned]) -> str:
    """One line: how many trials run, resume and are known already."""
    words = {
        "run": "to run",
        "resume": "to resume",
        "known": "finished before, not trained again",
        "stopped": "stopped early before",
        "cannot": "that cannot run",
    }
    counts = {action: sum(p.action == action for p in planned) for action in words}
    total = f"{len(planned)} trial" + ("s" if len(planned) != 1 else "")
    return f"{total}: " + ", ".join(f"{n} {words[action]}" for action, n in counts.items() if n)


@dataclass(frozen=True)
class Totals:
    """What is left to be done, of all trials together. None: unknown of at least one."""

    hours: float | None
    usd: float | None
    makespan: float | None
    disk: int


def totals(planned: list[Planned], coming: list[Estimate], cluster: Cluster, options: RunOptions) -> Totals:
    """``coming``: of trials that are still to be suggested by a search."""
    to_do = [p.estimate for p in planned if p.trains] + coming
    jobs = [(e.workers, e.seconds) for e in to_do]
    known = all(seconds is not None for _, seconds in jobs)
    return Totals(
        hours=_sum(e.hours for e in to_do),
        usd=_sum(e.usd for e in to_do),
        makespan=makespan(jobs, cluster.slots(options), options.max_concurrent) if known else None,
        disk=sum(e.disk for e in to_do),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if any(value is None for value in values) else sum(values)


def refuse_what_cannot_run(planned: list[Planned]) -> None:
    """Raises:
    InputError: a trial does not fit, with what would make it.
    """
    if cannot := [p for p in planned if p.action == "cannot"]:
        each = "\n".join(f"  {p.trial.label}: {p.reason}" for p in cannot)
        raise InputError(f"{len(cannot)} of {len(planned)} trials do not fit into memory:\n{each}")


def refuse_beyond_budget(total: Totals, spent: tuple[float, float | None], options: RunOptions) -> None:
    """``spent``: hours and US dollars that this sweep has taken before.

    Raises:
        InputError: with what is left to be done the sweep takes more than it may, or that cannot be told.
    """
    for flag, limit, before, takes, unit in (
        ("--budget-hours", options.budget_hours, spent[0], total.hours, "hours of devices"),
        ("--budget-usd", options.budget_usd, spent[1], total.usd, "US dollars"),
    ):
        if limit is None:
            continue
        if takes is None:
            what = "--price-per-hour" if flag == "--budget-usd" else "a device whose speed is known"
            raise InputError(f"{flag} {limit:g}: what this sweep takes is not known; it needs {what}, or leave it out")
        if takes and takes + (before or 0) > limit:
            raise InputError(
                f"{flag} {limit:g}: what is left of this sweep takes about {takes:,.3g} {unit}, after "
                f"{before or 0:,.3g} before; allow more, or sweep fewer lengths, methods or steps"
            )


def plan_table(planned: list[Planned], unit: str) -> Table:
    """One row a trial. ``unit``: what its hours are of, GPU or CPU."""
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    for name in ("workers", "memory", "recompute", "tokens/s", "time", f"{unit} h", "USD"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for each in planned:
        table.add_row(each.trial.label, each.action, *_cells(each), each.reason, style=_style(each))
    return table


def _style(planned: Planned) -> str | None:
    return {"known": "dim", "stopped": "dim", "cannot": "red"}.get(planned.action)


def _cells(planned: Planned) -> list[str]:
    estimate = planned.estimate
    if planned.action in ("known", "stopped") or estimate is None:
        return ["-"] * 7
    return [
        str(estimate.workers),
        f"{estimate.memory.total / GIB:.1f} of {estimate.has / GIB:.0f} GiB",
        _recompute(estimate),
        number_or_dash(estimate.tokens_per_second, ",.0f"),
        "-" if estimate.seconds is None else duration(estimate.seconds),
        number_or_dash(estimate.hours, ".2f"),
        number_or_dash(estimate.usd, ",.2f"),
    ]


def _recompute(estimate: Estimate) -> str:
    """How many of the layers that have a backward pass recompute their activations in it, or have them in host
    memory.
    """
    if not estimate.layers:
        return "-"
    layers, offloaded = estimate.execution.gradient_checkpointing, estimate.execution.layers_offloaded
    recompute = f"{layers} of {estimate.layers}" if layers else "none"
    return f"{recompute}, {offloaded} offloaded" if offloaded else recompute


def totals_line(total: Totals, cluster: Cluster) -> str:
    unit = "GPU" if cluster.gpus else "CPU"
    parts = ["time unknown" if total.makespan is None else f"about {duration(total.makespan)}"]
    parts.append(f"{number_or_dash(total.hours, ',.2f')} {unit} hours")
    parts.append("cost unknown" if total.usd is None else f"{total.usd:,.2f} USD")
    parts.append(f"{total.disk / GIB:.1f} GiB of checkpoints")
    has = f"{cluster.gpus:g} x {_gpu_name(cluster)}" if cluster.gpus else f"{cluster.cpus:g} CPUs"
    return f"to do: {', '.join(parts)}, on {has}"


def _gpu_name(cluster: Cluster) -> str:
    return " and ".join(sorted({node.gpu or "unknown GPU" for node in cluster.nodes if node.gpus}))


def main(arguments: list[str] | None = None) -> int:
    from orchestrator.cli import EXIT_FAILED_TRIALS, parse
    from orchestrator.sweep import Sweep
    from orchestrator.terminal import make_console

    console = make_console()
    try:
        name, spec, options = parse(sys.argv[1:] if arguments is None else arguments, plan=True)
        sweep = Sweep(name, spec, options, console)
        sweep.check()
        sweep.identify()
        sweep.cluster = _cluster(options)
        sweep.plan_trials()
        sweep.say_plan()
        sweep.refuse()
    except InputError as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return EXIT_USER_ERROR
    return EXIT_FAILED_TRIALS if any(p.action == "cannot" for p in sweep.planned) else 0


def _cluster(options: RunOptions) -> Cluster:
    """The cluster to plan for: a named one, the one at an address, or this machine."""
    if options.cluster is not None:
        return Cluster.named(options.cluster)
    if options.address in (None, "local"):
        return Cluster.this_machine()
    return join_or_start(options)


def as_json(planned: list[Planned], total: Totals) -> dict[str, Any]:
    """The plan as plain data: it is kept with the sweep, to be laid beside what came of it."""
    return {
        "totals": {"hours": total.hours, "usd": total.usd, "seconds": total.makespan, "disk_bytes": total.disk},
        "trials": [
            {
                "fingerprint": p.trial.fingerprint,
                "label": p.trial.label,
                "action": p.action,
                "reason": p.reason,
                "workers": p.estimate.workers,
                "memory_bytes": p.estimate.memory.total,
                "allocated_bytes": p.estimate.memory.allocated,
                "recomputed_layers": p.estimate.execution.gradient_checkpointing,
                "offloaded_layers": p.estimate.execution.layers_offloaded,
                "host_bytes": p.estimate.memory.host,
                "tokens_per_second": p.estimate.tokens_per_second,
                "seconds": p.estimate.seconds,
                "usd": p.estimate.usd,
            }
            for p in planned
            if p.estimate
        ],
    }


if __name__ == "__main__":
    # It ends within seconds: a fourth of them went into looking for garbage among what its imports make.
    gc.disable()
    status = main()
    gc.freeze()  # nor is there anything to look for at the end
    sys.exit(status)
