"""A plan as it is printed: a table of trials, a line of totals, and notes on what a user should know."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from orchestrator.planning.cluster import Cluster
from orchestrator.planning.cost import Totals
from orchestrator.planning.data_summary import data_summary
from orchestrator.planning.estimate import Estimate, Estimator
from orchestrator.planning.notes import notes
from orchestrator.planning.planner import Planned, summarise_actions, superseded
from orchestrator.planning.preparation import Identified, Prepared
from orchestrator.planning.sweep_plan import SweepPlan
from orchestrator.terminal import GIB, duration, gib, number_or_dash, usd


def print_plan(sweep: Identified, plan: SweepPlan, console: Console) -> None:
    """Prints what the sweep does with each trial, and the time and cost of all of it."""
    console.print(f"sweep {sweep.name}: {sweep.spec.model} on {sweep.spec.data}, storage {sweep.options.storage}")
    for line in data_summary(sweep):
        console.print(line, markup=False, soft_wrap=True)
    for note in sweep.model_notes:
        console.print(f"note: {note}", markup=False)
    for note in plan.left_out:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if labels := superseded(plan.planned, sweep.storage):
        console.print(
            "note: results of an earlier version of longspan are kept and not used, since this one may give others: "
            f"{', '.join(labels)}",
            markup=False,
        )
    console.print(summarise_actions(plan.planned))
    console.print(plan_table(plan.planned, _unit(plan.cluster)))
    if plan.upcoming:
        console.print(f"  and {len(plan.upcoming)} more, to be suggested by the search ({sweep.spec.search})")
    if plan.has_work:
        console.print(totals_line(plan.totals, plan.cluster))
        console.print(f"  ({plan.estimator.source}; {_price(plan.estimator, plan.cluster)})")
    for damage in sweep.storage.damaged:
        console.print(f"damaged: {damage}", style="yellow", markup=False, soft_wrap=True)


def print_notes(sweep: Prepared, plan: SweepPlan, mlflow_uri: str, console: Console) -> None:
    """Prints what a user should know before the sweep starts, errors aside."""
    scored = len(sweep.scored_documents(plan.trials))
    for note in notes(sweep.spec, sweep.options, sweep.original_length, sweep.packed, scored):
        console.print(f"note: {note}")
    if sweep.early_stopping and not any(sweep.early_stopping.rungs(trial.training) for trial in plan.trials):
        console.print(
            f"note: --early-stopping {sweep.options.early_stopping} never applies: no evaluation lies between the "
            "first rung and the last step; lower --first-rung or --eval-every"
        )
    if sweep.storage.store and mlflow_uri.startswith("sqlite:"):
        console.print(
            f"note: MLflow's store is on this machine, in {sweep.storage.mlflow}, because an object store cannot hold "
            "a database; to use a server, give --tracking-uri",
            soft_wrap=True,
        )


def plan_table(planned: Iterable[Planned], unit: str) -> Table:
    """One row a trial.

    Args:
        unit: what the hours count, GPU or CPU.
    """
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
    return {"known": "dim", "stopped": "dim", "infeasible": "red"}.get(planned.action)


def _cells(planned: Planned) -> list[str]:
    estimate = planned.estimate
    if planned.action in ("known", "stopped"):
        return ["-"] * 7
    return [
        str(estimate.workers),
        f"{estimate.memory.total / GIB:.1f} of {estimate.device_memory / GIB:.0f} GiB",
        _recompute(estimate),
        number_or_dash(estimate.tokens_per_second, ",.0f"),
        "-" if estimate.seconds is None else duration(estimate.seconds),
        number_or_dash(estimate.hours, ".2f"),
        number_or_dash(estimate.usd, ",.2f"),
    ]


def _recompute(estimate: Estimate) -> str:
    """How many of the layers with a backward pass recompute their activations in it, or keep them in host memory."""
    if not estimate.layers:
        return "-"
    layers, offloaded = estimate.execution.gradient_checkpointing, estimate.execution.layers_offloaded
    recompute = f"{layers} of {estimate.layers}" if layers else "none"
    return f"{recompute}, {offloaded} offloaded" if offloaded else recompute


def totals_line(total: Totals, cluster: Cluster) -> str:
    """One line: time, device hours, cost and disk space of what is left to do."""
    parts = ["time unknown" if total.makespan is None else f"about {duration(total.makespan)}"]
    parts.append(f"{number_or_dash(total.hours, ',.2f')} {_unit(cluster)} hours")
    parts.append("cost unknown" if total.usd is None else usd(total.usd))
    parts.append(f"{gib(total.disk)} of checkpoints")
    has = f"{cluster.gpus:g} x {_gpu_name(cluster)}" if cluster.gpus else f"{cluster.cpus:g} CPUs"
    return f"to do: {', '.join(parts)}, on {has}"


def _unit(cluster: Cluster) -> str:
    return "GPU" if cluster.gpus else "CPU"


def _gpu_name(cluster: Cluster) -> str:
    return " and ".join(sorted({node.gpu or "unknown GPU" for node in cluster.nodes if node.gpus}))


def _price(estimator: Estimator, cluster: Cluster) -> str:
    if estimator.price is None:
        return f"the price of {estimator.device.name} is unknown; set one with --price-per-hour"
    return f"{usd(estimator.price.usd_per_gpu_hour)} per {_unit(cluster)} hour: {estimator.price.source}"
