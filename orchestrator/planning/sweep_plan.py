"""The plan of a whole sweep on one cluster, frozen; a search that suggests a trial makes a new, longer plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.expansion import expand
from orchestrator.planning.budget_watch import Spending
from orchestrator.planning.cluster import Cluster
from orchestrator.planning.cost import Totals, refuse_over_budget, sum_up, within_rate
from orchestrator.planning.estimate import Estimate, Estimator
from orchestrator.planning.planner import Planned, find_forced, plan_trials, refuse_infeasible
from orchestrator.planning.preparation import Identified
from orchestrator.planning.rates import Rates
from orchestrator.planning.search import Search
from orchestrator.records.json_files import write_json
from orchestrator.trial_spec import TrialSpec
from workloads.config import Precision
from workloads.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep does with each of its trials, on which machines, and what is left to do.

    Args:
        concurrency: trials that run at the same time.
        upcoming: estimates of the trials that a search has not suggested yet.
        upcoming_tokens: the tokens that those train on.
        left_out: combinations of the axes' values that cannot be, in words.
    """

    cluster: Cluster
    concurrency: int
    estimator: Estimator
    planned: tuple[Planned, ...]
    upcoming: tuple[Estimate, ...]
    upcoming_tokens: int
    totals: Totals
    left_out: tuple[str, ...] = ()

    @cached_property
    def trials(self) -> tuple[TrialSpec, ...]:
        """All trials of the sweep so far, untuned references included."""
        return tuple(p.trial for p in self.planned)

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """By the trials' fingerprints."""
        return {p.trial.fingerprint: p.estimate for p in self.planned}

    @property
    def has_work(self) -> bool:
        """Whether anything is left to train or to evaluate."""
        return self.totals.trials > 0


def plan_sweep(sweep: Identified, cluster: Cluster) -> SweepPlan:
    """Plans the trials of a sweep on a cluster.

    A search has suggested no trials yet: one of each study stands for them.

    Raises:
        InputError: the cluster cannot run the sweep as asked.
    """
    spec, options = sweep.spec, sweep.options
    precision: Precision = cluster.precision if spec.precision == "auto" else spec.precision
    if "nf4" in spec.values_of("quantization") and not cluster.gpus:
        raise InputError("--quantization nf4 needs CUDA GPUs, and the cluster has none; leave it out")
    expansion = expand(spec, sweep.identities, precision)
    trials = expansion.trials
    rates = Rates.of(cluster, cluster.device(options).name, sweep.prices)
    cluster = within_rate(cluster, rates, options.budget_usd_per_hour)
    concurrency = cluster.concurrency(options)
    estimator = Estimator(sweep.shape, sweep.original_length, cluster, options, sweep.prices)
    if "fp8" in spec.values_of("quantization") and not estimator.device.multiplies_float8:
        raise InputError(
            "--quantization fp8 needs GPUs that multiply in FP8 (compute capability 8.9 or higher), and "
            f"{estimator.device.name} does not; leave it out"
        )
    sweep.storage.read_ahead([trial.fingerprint for trial in trials])
    planned = _plan(sweep, estimator, trials)
    upcoming: list[Estimate] = []
    if spec.search != "none":
        bases = [trial for trial in trials if trial.training.steps]
        upcoming = [estimator.estimate(base, fit=options.fit) for base in bases for _ in range(spec.search_trials - 1)]
    return SweepPlan(
        cluster=cluster,
        concurrency=concurrency,
        estimator=estimator,
        planned=tuple(planned),
        upcoming=tuple(upcoming),
        upcoming_tokens=0,
        totals=sum_up(planned, upcoming, estimator),
        left_out=tuple(expansion.left_out),
    )


def begin_search(sweep: Identified, plan: SweepPlan) -> tuple[Search, SweepPlan]:
    """Resumes or starts the sweep's search; returns it with a plan of what it has suggested so far."""
    bases = [trial for trial in plan.trials if trial.training.steps]
    search = Search(sweep.spec, bases, sweep.storage, sweep.storage.search_journal(sweep.name))
    search.begin()
    references = [trial for trial in plan.trials if not trial.training.steps]
    planned = _plan(sweep, plan.estimator, [*references, *search.trials])
    return search, _replan(sweep, plan, planned, search)


def next_suggestion(sweep: Identified, plan: SweepPlan, search: Search) -> tuple[Planned | None, SweepPlan]:
    """The next trial that the search suggests, None if there is no other, and the plan with it."""
    trial = search.next()
    added = _plan(sweep, plan.estimator, [trial]) if trial else []
    return (added[0] if added else None), _replan(sweep, plan, [*plan.planned, *added], search)


def _replan(sweep: Identified, plan: SweepPlan, planned: Sequence[Planned], search: Search) -> SweepPlan:
    upcoming = tuple(
        plan.estimator.estimate(study.base, fit=sweep.options.fit)
        for study in search.studies
        for _ in range(study.to_come)
    )
    return dataclasses.replace(
        plan,
        planned=tuple(planned),
        upcoming=upcoming,
        upcoming_tokens=search.tokens_to_come,
        totals=sum_up(planned, upcoming, plan.estimator),
    )


def _plan(sweep: Identified, estimator: Estimator, trials: Sequence[TrialSpec]) -> list[Planned]:
    return plan_trials(
        trials,
        sweep.storage,
        estimator,
        fit=sweep.options.fit,
        stopping_sweep=sweep.name if sweep.early_stopping else None,
        forced=find_forced(trials, sweep.options),
    )


def refuse_impossible(sweep: Identified, plan: SweepPlan) -> None:
    """Raises InputError if a trial does not fit into memory, or all together exceed the budget."""
    refuse_infeasible(plan.planned)
    if sweep.options.budget_hours is not None or sweep.options.budget_usd is not None:
        refuse_over_budget(plan.totals, Spending(sweep.name, sweep.storage).so_far(plan.trials), sweep.options)


def write_plan(sweep: Identified, plan: SweepPlan) -> None:
    """Writes the sweep's list of trials (``sweep.json``) and its plan (``plan.json``) into its folder."""
    listed = {"name": sweep.name, "trials": [trial.fingerprint for trial in plan.trials]}
    write_json(sweep.folder / "sweep.json", listed)
    write_json(sweep.folder / "plan.json", as_json(plan.planned, plan.totals))
    sweep.storage.push(sweep.folder)


def as_json(planned: Iterable[Planned], total: Totals) -> dict[str, Any]:
    """The plan as plain data: kept with the sweep as ``plan.json``, to compare with the trials' actual cost."""
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
        ],
    }
