"""What the orchestrator adds to training time: ``python -m benchmarks.overheads``, about 2 minutes.

It needs a quiet machine.

    first step      seconds from the command of a default sweep to the first training step of its first trial
    between trials  seconds from the end of one trial to the first step of the next, one at a time
    report          the time of a step's line in the journal, and of a step with it and without
    plan            ``python -m orchestrator.plan``, from start to end: the default sweep, and one of 1,000 trials,
                    with an empty storage and with 1,000 finished journals of 100 steps each; also in CPU seconds, which
                    are about the same on a busy machine

Steps are tiny (64 tokens), so nearly all the measured time is overhead. All files are removed at the end.
"""

from __future__ import annotations

import itertools
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from orchestrator.cli import parse
from orchestrator.expansion import expand
from orchestrator.planning.cluster import Cluster
from orchestrator.planning.planner import plan_trials
from orchestrator.planning.preparation import check_sweep, identify
from orchestrator.planning.sweep_plan import SweepPlan, plan_sweep
from orchestrator.records.events import make_event
from orchestrator.records.provenance import cpu_name
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities, TrialSpec
from workloads.config import ExecutionConfig
from workloads.data import Corpus, prepare
from workloads.engines.engine import Engine
from workloads.files.json_text import json_text
from workloads.models.source import ModelSource
from workloads.training.loop import run

# Steps of the trials in a timed sweep, and of the loop that times the journal.
STEPS, LOOP_STEPS = 3, 200
TINY = f"convergence --context-lengths 64 --steps {STEPS} --batch 1 --eval-documents 2 --eval-every 100".split()
# 3 methods and 2 lengths for each, with 6 references: 1,002 trials.
SEEDS = [str(seed) for seed in range(166)]
JOURNAL_STEPS = 100


def command(module: str, *arguments: str) -> tuple[float, float]:
    """(wall-clock seconds of ``python -m module`` from start to end, CPU seconds).

    Raises:
        RuntimeError: it failed; the message holds its output.
    """
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.time() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sweep_seconds(folder: Path, *flags: str) -> tuple[float, float, list[TrialRecord]]:
    """(when a sweep's command was started, its seconds, records of its trained trials in the order of their start)."""
    began = time.time()
    seconds, _ = command("orchestrator.sweep", *TINY, "--storage", str(folder), *flags)
    records = [TrialRecord.of(Storage.at(str(folder)).trial(path.name).journal) for path in folder.glob("trials/*")]
    return began, seconds, sorted((r for r in records if r.steps), key=lambda record: record.launched.time)


def first_step_of(record: TrialRecord) -> float:
    """When its first step ended."""
    return record.steps[min(record.steps)].time


def first_step(folder: Path) -> dict[str, float]:
    began, seconds, records = sweep_seconds(folder)
    return {"first step": min(map(first_step_of, records)) - began, "whole sweep": seconds}


def between_trials(folder: Path) -> dict[str, float]:
    """Trials run one at a time; the start of the first is not counted."""
    _, _, records = sweep_seconds(folder, "--max-concurrent", "1", "--references", "--seeds", "0", "1")
    gaps = [first_step_of(after) - before.ended for before, after in itertools.pairwise(records)]
    return {"between trials": statistics.median(gaps), "longest": max(gaps)}


def report(folder: Path) -> dict[str, float]:
    """The training loop in this process, without Ray, alternately with and without a journal."""
    torch.set_num_threads(1)
    storage, source = Storage.open(str(folder)), ModelSource.parse("builtin:tiny")
    corpus = prepare(Corpus.parse("builtin:stdlib"), source.tokenizer, source.tokenizer_identity, storage.data)
    trial = tiny_trial(source)
    appended: list[float] = []
    steps: dict[bool, list[float]] = {True: [], False: []}
    for index in range(6):
        writes, last = index % 2 == 0, []
        trial_folder = storage.add_trial(trial)

        def emit(event: str, *, writer: Any, writes: bool = writes, last: list[float] = last, **fields: Any) -> None:
            before = time.perf_counter()
            if event == "step" and last:
                steps[writes].append(before - last[0])
            last[:] = [before]
            if writes:
                writer.append(make_event(event, **fields))
                if event == "step":
                    appended.append(time.perf_counter() - before)

        # As in a worker: with the trial's lease, which is checked before each line.
        with trial_folder.lease("benchmark") as lease, trial_folder.writer(lease) as writer:
            engine = Engine(torch.device("cpu"), "float32")
            checkpoints = folder / f"checkpoints-{index}"
            run(source, trial.training, ExecutionConfig(), corpus, checkpoints, engine, partial(emit, writer=writer))
    return {
        "journal append": statistics.median(appended),
        "step with": statistics.median(steps[True]),
        "step without": statistics.median(steps[False]),
    }


def tiny_trial(source: ModelSource) -> TrialSpec:
    """A trial of 64 tokens that evaluates as rarely as possible."""
    spec = SweepSpec(
        model="builtin:tiny", data="builtin:stdlib", context_lengths=(64,), methods=("lora",), references=(), batch=1,
        steps=LOOP_STEPS, eval_every=LOOP_STEPS, eval_documents=1,
    )  # fmt: skip
    known = Identities(model=source.identity, tokenizer=source.tokenizer_identity, data="benchmark")
    return expand(spec, known, "float32").trials[0]


def planning(folder: Path) -> dict[str, float]:
    """Commands from start to end, then only a sweep's planning, in this process."""
    many = ["--seeds", *SEEDS]
    empty, full = (Storage.open(str(folder / name)) for name in ("empty", "full"))
    for trial in make_plan(full, many).trials:
        write_finished(full, trial)
    seconds = {}
    for name, storage, flags in (
        ("default", empty, []), ("1,000 trials", empty, many), ("1,000 finished trials", full, many)
    ):  # fmt: skip
        wall, cpu = command("orchestrator.plan", "convergence", "--storage", str(storage.root), *flags)
        seconds |= {name: wall, f"{name}, CPU": cpu}
    for name, storage in (("1,000 trials", empty), ("1,000 finished trials", full)):
        plan = make_plan(storage, many)
        began = time.perf_counter()
        plan_trials(plan.trials, storage, plan.estimator)
        seconds[f"{name}, planning alone"] = time.perf_counter() - began
    return seconds


def make_plan(storage: Storage, flags: list[str]) -> SweepPlan:
    sweep = parse(["convergence", *flags, "--storage", str(storage.root)])
    return plan_sweep(identify(check_sweep(*sweep)), Cluster.this_machine())


def write_finished(storage: Storage, trial: TrialSpec) -> None:
    """Writes the journal of a finished trial, at once: appending line by line would wait for the disk each time."""
    journal = storage.add_trial(trial).journal
    events = [{"event": "launched"}, {"event": "started", "hardware": "another machine", "workers": 1, "packages": {}}]
    events.append({"event": "model", "parameters": 3_086_592, "trainable_parameters": 43_008})
    documents = trial.training.eval_documents
    for step in range(1, JOURNAL_STEPS + 1):
        measured = dict(tokens_per_second=5_120.0, seconds=0.4, peak_memory_gib=0.7, learning_rate=1e-3, grad_norm=0.5)
        events.append({"event": "step", "step": step, "tokens": 2048 * step, "loss": 1.25, **measured})
        if step % 20 == 0:
            scores = dict(perplexity=2.5, nll=[123.456789] * documents, num_tokens=[2047] * documents)
            length = trial.training.context_length
            events.append({"event": "eval", "step": step, "tokens": 2048 * step, "context_length": length, **scores})
    events += [{"event": "saved", "step": JOURNAL_STEPS}, {"event": "finished"}]
    lines = (json_text({"event": "", "time": 1.0 + index, **event}) for index, event in enumerate(events))
    journal.path.write_text("\n".join(lines) + "\n")


def rows(figures: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| what | figure |", "|---|---|"]
    for group, values in figures.items():
        for name, value in values.items():
            shown = f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.2f} ms"
            lines.append(f"| {group}: {name} | {shown} |")
    return lines


def main(json_file: Path | None = None) -> None:
    """Measures and prints a table.

    Args:
        json_file: the results as JSON; by default they are printed after the table.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="longspan-overheads-") as name:
        folder = Path(name)
        figures = {
            "plan": planning(folder),
            "report": report(folder / "report"),
            "sweep": first_step(folder / "first") | between_trials(folder / "between"),
        }
    after = os.getloadavg()
    machine = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load before and after": [before[0], after[0]],
    }
    print("\n".join(rows(figures)))
    content = json_text({"machine": machine, "seconds": figures}, indent=1)
    if json_file is None:
        print(content)
    else:
        json_file.write_text(content)


if __name__ == "__main__":
    tyro.cli(main)
