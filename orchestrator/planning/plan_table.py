"""A plan as it is printed: a table of trials, a line of totals, and notes on what a user should know."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from orchestrator.planning.cluster import Cluster
from orchestrator.planning.cost import Totals
from orchestrator.planning.data_summary import data_summary
from orchestrator.planning.estimate import Estimate, Estimator
from orchestrator.planning.layout import suggest_layout
from orchestrator.planning.notes import notes
from orchestrator.planning.planner import Planned, summarise_actions, superseded
from orchestrator.planning.preparation import Identified, Prepared
from orchestrator.planning.sweep_plan import SweepPlan
from orchestrator.terminal import GIB, and_list, duration, gib, number_or_dash, usd


def print_plan(sweep: Identified, plan: SweepPlan, console: Console) -> None:
    """Prints what the sweep does with each trial, and the time and cost of all of it."""
    console.print(f"sweep {sweep.name}: {sweep.spec.model} on {sweep.spec.data}, storage {sweep.options.storage}")
    for line in data_summary(sweep):
        console.print(line, markup=False, soft_wrap=True)
    if sweep.unread:
        console.print(
            f"note: the hub does not give {and_list(sweep.unread)} (no network, or no token): planned from published "
            "sizes, as if no trial had run; the sweep itself needs the hub"
        )
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
    console.print(plan_table(plan.planned, _unit(plan.cluster), console.width))
    if plan.upcoming:
        console.print(f"  and {len(plan.upcoming)} more, to be suggested by the search ({sweep.spec.search})")
    if plan.has_work:
        console.print(totals_line(plan.totals, plan.cluster))
        console.print(_hanging("  ", Text(plan.estimator.source)))
        console.print(_hanging("  ", Text(_cost_line(plan.totals, plan.estimator))))
        if not plan.upcoming and (
            better := suggest_layout(plan.planned, plan.totals, plan.estimator, sweep.options.fit)
        ):
            console.print(_hanging("  ", Text(f"better: {better}")))
    if plan.cluster.is_only_planned_for and any(p.estimate.execution.engine.startswith("zero") for p in plan.planned):
        console.print("note: ZeRO needs DeepSpeed on the cluster's machines: pip install 'longspan[deepspeed]'")
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


def plan_table(planned: Sequence[Planned], unit: str, width: int) -> RenderableType:
    """The trials, one a row, with numbered reasons below; where that is too wide, two lines a trial.

    Args:
        unit: what the hours count, GPU or CPU.
        width: of the terminal, in columns.
    """
    reasons = list(dict.fromkeys(p.footnote for p in planned if p.footnote))
    numbers = [f"[{reasons.index(p.footnote) + 1}]" if p.footnote else "" for p in planned]
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    for name in ("workers", "memory", "recompute", "tokens/s", "time", f"{unit} h", "USD"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why" if reasons else "", no_wrap=True)
    for each, number in zip(planned, numbers):
        table.add_row(each.trial.label, each.action, *_cells(each), number, style=_style(each))
    trials: RenderableType = table
    if Measurement.get(unlimited := Console(width=10_000), unlimited.options, table).maximum > width:
        trials = Group(*(_stacked(*each, unit) for each in zip(planned, numbers)))
    return Group(trials, *(_footnote(number, reason) for number, reason in enumerate(reasons, start=1)))


def _footnote(number: int, reason: str) -> RenderableType:
    """A numbered reason whose lines after the first are indented."""
    return _hanging(f"[{number}] ", Text(reason))


def _hanging(first: str, text: Text) -> RenderableType:
    grid = Table.grid()
    grid.add_column(width=len(first))
    grid.add_column(overflow="fold")
    grid.add_row(Text(first), text)
    return grid


def _stacked(planned: Planned, number: str, unit: str) -> RenderableType:
    """A trial whose numbers are under its name, for narrow terminals."""
    workers, memory, recompute, speed, time, hours, cost = _cells(planned)
    words = [
        f"{workers} worker{'s' * (workers != '1')}", memory, f"recompute {recompute}", f"{speed} tokens/s", time,
        f"{hours} {unit} h", f"{cost} USD",
    ]  # fmt: skip
    known = [word for word, cell in zip(words, _cells(planned)) if cell != "-"]
    head = " ".join(filter(None, (planned.trial.label, planned.action, number)))
    lines = Group(Text(head), _hanging("   ", Text(", ".join(known)))) if known else Text(head)
    return Styled(lines, _style(planned) or "")


def _style(planned: Planned) -> str | None:
    return {"known": "dim", "stopped": "dim", "infeasible": "red"}.get(planned.action)


def _cells(planned: Planned) -> list[str]:
    estimate = planned.estimate
    if planned.action in ("known", "stopped"):
        return ["-"] * 7
    memory = f"{estimate.memory.total / GIB:.1f} of {estimate.device_memory / GIB:.0f} GiB"
    if planned.action == "infeasible":
        return [str(estimate.workers), memory, *["-"] * 5]
    return [
        str(estimate.workers),
        memory,
        _recompute(estimate),
        number_or_dash(estimate.tokens_per_second, ",.0f"),
        "-" if estimate.seconds is None else duration(estimate.seconds),
        number_or_dash(estimate.hours, ",.2f"),
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
    """One line: time, device hours, cost and disk space of what is left to do, of the trials that can run."""
    parts = ["time unknown" if total.makespan is None else f"about {duration(total.makespan)}"]
    parts.append(f"{number_or_dash(total.hours, ',.2f')} {_unit(cluster)} hours")
    parts.append("cost unknown" if total.usd is None else usd(total.usd))
    parts.append(f"{gib(total.disk)} of checkpoints")
    has = f"{cluster.gpus:g} x {_gpu_name(cluster)}" if cluster.gpus else f"{cluster.cpus:g} CPUs"
    whole = total.trials + total.infeasible
    which = f" for {total.trials} of {whole} trials" if total.infeasible else ""
    return f"to do{which}: {', '.join(parts)}, on {has}"


def _cost_line(total: Totals, estimator: Estimator) -> str:
    """How the cost comes about: whole machines, by the hour."""
    if total.usd is None or total.machine_hours is None or total.usd_per_hour is None:
        return estimator.rates.source
    machines = f"{total.machines} machine{'s' * (total.machines != 1)}"
    idle = "idle GPUs included" if estimator.cluster.gpus else "idle CPUs included"
    return (
        f"billed: {total.machine_hours:,.2f} hours of {machines}, {idle}, at most {usd(total.usd_per_hour)} an hour; "
        f"{estimator.rates.source}"
    )


def _unit(cluster: Cluster) -> str:
    return "GPU" if cluster.gpus else "CPU"


def _gpu_name(cluster: Cluster) -> str:
    return " and ".join(sorted({node.gpu or "unknown GPU" for node in cluster.nodes if node.gpus}))
