"""Whole training steps of a 7B model: longspan compared with what users would run instead. Needs a CUDA device.

    python -m benchmarks.training_speed                        # the table, for at most ten minutes
    python -m benchmarks.training_speed                        # again: continues with the missing cases
    python -m benchmarks.training_speed --cases 8k-s2 8k-user  # these, measured again
    python -m benchmarks.training_speed --profile              # and where a step's time goes, at 8k and 98k
    python -m benchmarks.training_speed --picture speed.png    # from the JSON; needs no GPU

Random weights and random tokens; nothing depends on their values. The cases are in cases.py, the baselines in
baselines.py. longspan's step is its own (``Trial.train_step``), with the execution settings that it chooses by itself.
Each case is measured in a separate process and then written to the JSON file.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from transformers import LlamaConfig

from benchmarks import baselines, step_profile, unsloth_baseline
from benchmarks.cases import CASES, PROFILED, PROFILED_STEPS, Case, Implementation, Row, baseline
from benchmarks.memory import MODELS, start_trial
from benchmarks.processes import Failed, Worker
from benchmarks.speed_picture import draw
from benchmarks.timing import GIB, describe, machine, seconds_of, write_json
from workloads.attention.interface import backend_of
from workloads.budget import (
    Device,
    ModelShape,
    host_memory,
    model_flops_utilisation,
    reduce_memory,
    smallest_change_that_fits,
)
from workloads.config import ExecutionConfig
from workloads.training.loop import Trial

# Of the machine that the published table comes from: its container does not expose its limit.
HOST_MEMORY = 128 * GIB
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"
SPARE = 10.0  # seconds to end a process that a case has started, and to clean up after it
COUNTING = (
    "tokens/s: tokens of a step over its median time, forward, backward and optimiser, by device events. MFU: the "
    "model's own FLOPs (attention causal, nothing computed twice, no weight gradient of frozen weights) over the "
    "device's peak. Limit: of one H200, nothing recomputed (benchmarks/cases.py). Published S²: its first half group "
    "attends to the last, so it is not the same function. The baselines take fewer steps than longspan."
)


def measure(
    case: Case, config: LlamaConfig, device: torch.device, profiled: bool = False, smaller: bool = False
) -> Row:
    """Measures a case in this process. ``smaller``: longspan takes its next smaller memory plan."""
    settings: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if case.implementation == "longspan":
                step, settings = longspans_step(case, config, device, Path(folder), smaller)
            else:
                step = baselines_step(case, config, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = seconds_of(step, device, case.warmup, case.steps)
            peaks = {}
            if device.type == "cuda":
                peaks["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
                peaks["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
            parts = profile_or_none(step, config.vocab_size) if profiled else None
    except torch.OutOfMemoryError as error:
        # torch's message says how much memory it holds and how much other processes do.
        return Row(case=case.name, outcome=OUT_OF_MEMORY, settings=settings, reason=str(error))
    profile = dataclasses.asdict(parts) if parts else None
    return row_of(case, config, device, seconds, outcome=MEASURED, settings=settings, profile=profile, **peaks)


def profile_or_none(step: Callable[[], None], vocab_size: int) -> step_profile.StepProfile | None:
    """A step's profile; None if the profiler fails, which must not lose the measured speed. stderr says why."""
    try:
        return step_profile.step_profile(step, vocab_size, PROFILED_STEPS)
    except Exception:
        traceback.print_exc()
        return None


def measure_7b(name: str, seconds: float, profiled: bool, smaller: bool = False) -> Row:
    """Measures a case of the table in at most ``seconds``; runs in a worker process."""
    case, device = CASES[name], torch.device("cuda", 0)
    if case.implementation == "Unsloth":
        measured = unsloth_baseline.measure_in_process(case.context_length, case.warmup, case.steps, seconds)
        return row_of(case, MODELS["7B"], device, **measured)
    return measure(case, MODELS["7B"], device, profiled, smaller)


def row_of(case: Case, config: LlamaConfig, device: torch.device, seconds: Sequence[float] = (), **fields: Any) -> Row:
    """A row, with speed and MFU from the seconds of each step."""
    if not seconds:
        return Row(case=case.name, **fields)
    speed = case.context_length / statistics.median(seconds)
    known = Device.named(machine(device)["device"])
    mfu = model_flops_utilisation(ModelShape.of(config), case.training, speed, known) if known else None
    return Row(case=case.name, seconds=list(seconds), tokens_per_second=speed, mfu=mfu, **fields)


def longspans_step(
    case: Case, config: LlamaConfig, device: torch.device, folder: Path, smaller: bool = False
) -> tuple[Callable[[], None], dict[str, Any]]:
    """One training step of longspan as a function, and its settings."""
    execution = planned_execution(case, config, device)
    if smaller:  # as a sweep does (orchestrator/running/faults.py)
        execution = reduce_memory(execution, case.training.batch, config.num_hidden_layers) or execution
    config = copy.deepcopy(config)  # the attention pattern is written into it
    trial, model = start_trial(config, case.training, execution, device, folder)
    return lambda: trial.train_step(model), resolved_settings(trial)


def planned_execution(case: Case, config: LlamaConfig, device: torch.device) -> ExecutionConfig:
    """Longspan's defaults, changed as its plan would to fit the trial on the device.

    On a GPU layers are compiled, as longspan does in a trial longer than these few steps.
    """
    known = Device.named(machine(device)["device"])
    requested = ExecutionConfig(
        compile_layers="on" if device.type == "cuda" else "auto", offload_activations=case.offload_activations
    )
    if known is None:
        return dataclasses.replace(requested, offload_activations=requested.layers_offloaded)
    known = dataclasses.replace(known, host_memory=min(host_memory(), HOST_MEMORY))
    fit = smallest_change_that_fits(ModelShape.of(config), case.training, requested, 1, known)
    return fit.execution if fit else requested


def resolved_settings(trial: Trial) -> dict[str, Any]:
    default = ExecutionConfig()
    names = [each.name for each in dataclasses.fields(default)]
    chosen = {name: getattr(trial.execution, name) for name in names}
    changed = {name: value for name, value in chosen.items() if value != getattr(default, name)}
    return changed | {"attention_backend": backend_of(trial.model)}


def baselines_step(case: Case, config: LlamaConfig, device: torch.device) -> Callable[[], None]:
    if case.implementation == "Liger":
        baselines.with_liger_kernels()
    model = baselines.users_model(config, device, case.method, case.group_size)
    return baselines.users_step(model, case.context_length)


class Results:
    """Rows by case, of one machine and its versions; on disk as JSON after every row."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Reads earlier results, if there are any.

        Raises:
            SystemExit: they were measured on another machine or with other versions.
        """
        self.path, self.facts, self.rows = path, facts, {}
        if path.exists():
            known, self.rows = read(path)
            if known != facts:
                different = ", ".join(name for name in facts | known if facts.get(name) != known.get(name))
                raise SystemExit(
                    f"{path} was measured on another machine or with other versions ({different} differ); name another "
                    "file with --json"
                )

    def add(self, row: Row) -> None:
        self.rows[row.case] = row
        rows = {name: dataclasses.asdict(CASES[name]) | dataclasses.asdict(row) for name, row in self.rows.items()}
        for name, content in rows.items():
            content |= {"limit": CASES[name].limit, "must_reach": CASES[name].must_reach}
        write_json(self.path, {"machine": self.facts, "model": "Llama-2-7B", "counting": COUNTING, "rows": rows})

    def missing(self, profile: bool) -> list[str]:
        """Cases without a result; not those of Liger or Unsloth if it is not installed."""
        packages = {"Liger": "liger-kernel", "Unsloth": "unsloth"}
        possible = [
            name
            for name, case in CASES.items()
            if case.implementation not in packages or self.facts.get(packages[case.implementation])
        ]
        return [name for name in possible if not self.has(name, profile and name in PROFILED)]

    def has(self, name: str, profiled: bool) -> bool:
        row = self.rows.get(name)
        done = row is not None and row.outcome in (MEASURED, OUT_OF_MEMORY)
        return done and not (profiled and row.outcome == MEASURED and row.profile is None)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Row]]:
    """Machine and rows of a JSON file. Rows of cases that no longer exist are left out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    names = {each.name for each in dataclasses.fields(Row)}
    rows = {case: Row(**{name: row[name] for name in names & row.keys()}) for case, row in content["rows"].items()}
    return content["machine"], {case: row for case, row in rows.items() if case in CASES}


HEADER = (
    "case", "implementation", "context", "group", "tokens/s", "must reach", "stretch", "x user's way", "x published S²",
    "limit", "of limit", "MFU", "peak GiB", "ms a step", "steps", "settings, or failure",
)  # fmt: skip


def line(case: Case, row: Row, rows: dict[str, Row]) -> str:
    """A row of the table."""

    def shown(value: float | None, form: str = ",.0f") -> str:
        return "-" if value is None else format(value, form)

    speed = row.tokens_per_second
    cells = [case.name, case.implementation, f"{case.context_length:,}", shown(case.group_size), shown(speed)]
    cells += [shown(case.must_reach), shown(case.stretch)]
    cells += [shown(ratio(case, row, other, rows), ".2f") for other in ("user's way", "published S²")]
    cells += [shown(case.limit), shown(speed and case.limit and speed / case.limit, ".0%")]
    cells += [shown(row.mfu, ".1%"), shown(row.peak_gib, ".1f")]
    cells += [shown(1e3 * statistics.median(row.seconds)) if row.seconds else "-", f"{case.warmup} + {case.steps}"]
    settings = ", ".join(f"{name} {value}" for name, value in row.settings.items()) or "-"
    settings += "; second attempt" if row.reason else ""
    cells.append(settings if row.outcome == MEASURED else row.outcome)
    return "| " + " | ".join(cells) + " |"


def ratio(case: Case, row: Row, to: Implementation, rows: dict[str, Row]) -> float | None:
    """How many times as fast longspan is as the same case by other code; None if one is not measured."""
    other = baseline(case, to)
    theirs = rows[other.name].tokens_per_second if other and other.name in rows else None
    if case.implementation != "longspan" or row.tokens_per_second is None or theirs is None:
        return None
    return row.tokens_per_second / theirs


def table(rows: dict[str, Row]) -> str:
    """All rows, in the order of the cases."""
    head = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    return "\n".join(head + [line(CASES[name], rows[name], rows) for name in CASES if name in rows])


def run(names: list[str], results: Results, profile: bool, until: float) -> None:
    """Measures these cases one after the other until ``until`` on the monotonic clock."""
    print(f"{len(names)} cases, about {sum(CASES[name].seconds for name in names):.0f} s", flush=True)
    waiting = Worker(measure_7b) if names else None
    try:
        for index, name in enumerate(names):
            case, left = CASES[name], until - time.monotonic()
            if case.seconds > left:
                print(f"{name}: not started: it takes about {case.seconds:.0f} s and {left:.0f} s are left", flush=True)
                continue
            print(f"{name}: about {case.seconds:.0f} s", flush=True)
            worker, waiting = waiting, Worker(measure_7b) if index + 1 < len(names) else None
            profiled = profile and name in PROFILED
            try:
                row = worker.call(name, left - SPARE, profiled, seconds=left)
                if row.outcome == OUT_OF_MEMORY and case.implementation == "longspan":
                    print(
                        f"{name}: out of memory; trying again with less memory, as in a sweep\n{row.reason}", flush=True
                    )
                    left = until - time.monotonic()
                    again = Worker(measure_7b).call(name, left - SPARE, profiled, True, seconds=left)
                    row = dataclasses.replace(again, reason=row.reason)
            except Failed as failure:
                row = Row(case=name, outcome=str(failure))
            results.add(row)
            print(line(case, row, results.rows), flush=True)
            if row.outcome == OUT_OF_MEMORY:
                print(row.reason, flush=True)
            if row.profile:
                print(step_profile.table(row.profile["parts"]), flush=True)
    finally:
        if waiting:
            waiting.close()


def main(
    cases: tuple[str, ...] = (),
    json_file: Annotated[Path, tyro.conf.arg(name="json")] = Path("training_speed.json"),
    minutes: float = 9.5,
    profile: bool = False,
    picture: Path | None = None,
) -> None:
    """Measures training steps of a 7B model and prints a table.

    Args:
        cases: names of the cases to measure, even if the JSON file has them; by default all that it lacks.
        json_file: the results; read if it exists, and written after every case.
        minutes: time limit of the whole run; a case that would not finish in it is not started.
        profile: also print where a step's time goes, at 8k and 98k.
        picture: measure nothing; draw the JSON file as this PNG.
    """
    began = time.monotonic()
    if picture:
        draw(*read(json_file), picture)
        return
    if unknown := [name for name in cases if name not in CASES]:
        raise SystemExit(f"no case is called {', '.join(unknown)}; there are {', '.join(CASES)}")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.training_speed needs a CUDA device; torch finds none here")
    facts = machine(torch.device("cuda", 0))
    results = Results(json_file, facts)
    print(describe(facts), flush=True)
    run(list(cases) or results.missing(profile), results, profile, began + 60 * minutes)
    print(f"\n{describe(facts)}\nLlama-2-7B's shape, random weights. {COUNTING}\n\n{table(results.rows)}")
    if missing := results.missing(profile):
        print(f"\nMissing: {', '.join(missing)}. The same command continues with them.")
    print(f"{time.monotonic() - began:.0f} s; {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
