"""What MLflow shows of journal events and comparisons: metrics, tags and statuses, by their names there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from orchestrator.records.events import Cancelled, Eval, Event, Failed, Finished, ModelReady, Started, Step, Stopped
from orchestrator.records.trial_record import TrialRecord
from workloads.evaluation.intervals import perplexity_interval

# MLflow's status for a trial's state; a trial that has not begun has no run. One stopped early counts as killed: its
# last perplexity is of fewer tokens, and a filter on FINISHED leaves it out. Its tag stopped_early has the reason.
STATUS = {
    "starting": "RUNNING", "running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED",
    "cancelled": "KILLED", "failed": "FAILED",
}  # fmt: skip

# What a chart's horizontal axis can be, besides the step: logged with every step and every evaluation.
TOKENS, HOURS = "train/tokens", "train/device_hours"

# MLflow's names of a step's fields.
STEP_METRICS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "perf/tokens_per_second",
    "peak_memory_gib": "perf/peak_memory_gib",
    "mfu": "perf/mfu",  # on GPUs whose peak is known
}


def metrics_of(event: Step | Eval, workers: int, hours: float | None) -> dict[str, float]:
    """The metrics of a step or an evaluation, to which a trial has trained for ``hours`` of all its devices."""
    metrics = {TOKENS: float(event.tokens)}
    if hours is not None:
        metrics[HOURS] = hours
    match event:
        case Step():
            values = {name: getattr(event, field) for field, name in STEP_METRICS.items()}
            metrics |= {name: value for name, value in values.items() if value is not None}
            metrics["perf/tokens_per_second_per_gpu"] = event.tokens_per_second / workers
        case Eval():
            name = perplexity_metric(event.context_length)
            metrics[name] = event.perplexity
            interval = perplexity_interval(event.scores)
            if interval.low is not None and interval.high is not None:
                metrics |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return metrics


def perplexity_metric(context_length: int) -> str:
    """The metric of the perplexity at a context length; the ends of its interval are named so with _low and _high."""
    return f"eval/perplexity_{context_length}"


def tags_of(event: Event, record: TrialRecord) -> dict[str, str]:
    """The tags that an event sets on its trial's run; ``record`` has taken the event in."""
    match event:
        case Started():
            # Tags, not parameters: those cannot change when a trial is resumed with other settings.
            return attempt_tags(event) | {f"execution.{name}": str(v) for name, v in event.execution.items()}
        case ModelReady() if event.attention_backend is not None:
            return {"attention_backend": event.attention_backend}
        case Stopped():
            return {"stopped_early": event.reason[:5000]}
        case Cancelled():
            return {"cancelled": f"at step {event.step}, by {event.by}"}
        case Failed():
            return {"failure": event.reason[:5000]}
        case Finished():
            earlier = {"stopped_early": record.stopped, "cancelled": record.cancelled}
            return {name: "no: it went on, and finished" for name, ended in earlier.items() if ended}
    return {}


def attempt_tags(started: Started) -> dict[str, str]:
    """The code and machine of an attempt, as tags of the trial's run."""
    fields = (
        *("hardware", "host", "platform", "python", "driver", "cuda", "git_commit", "git_diff", "device_memory_gib"),
        *("usd_per_device_hour", "price_source"),
    )
    tags = {name: str(value) for name in fields if (value := getattr(started, name)) is not None}
    return tags | {f"package.{name}": version for name, version in started.packages.items()}


def trial_tag(label: str) -> str:
    """The tag of a sweep's run that holds a trial's run id: of the characters that MLflow takes in a key."""
    return re.sub(r"[^\w.\- :/]", "_", f"trial.{label.replace('+', '_plus')}")


def sweep_metrics(context: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """(name, value, step) of a comparison's numbers for a context length; a variant's are those of its best setting."""
    length = context["context_length"]
    for setting in context["settings"]:
        variant, step = setting["variant"], setting["final"]["step"]
        if setting["chosen"]:
            yield f"final/perplexity_{length}/{variant}", setting["final"]["perplexity"], step
            if setting["hours"] is not None:
                yield f"final/{context['hours_unit'].replace(' ', '_')}_{length}/{variant}", setting["hours"], step
            if setting["reached"]:
                yield f"to_target/tokens_{length}/{variant}", setting["reached"]["tokens"], step
    for gap in context["gaps"]:
        for point in gap["points"]:
            yield f"gap_percent_{length}/{gap['method']} to {gap['baseline']}", point["percent"], point["step"]
