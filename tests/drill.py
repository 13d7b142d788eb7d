"""The long forms of the fault tests, for a release: ``make drill``, or ``python -m tests.drill [DRILL ...]``.

Each drill breaks something in real sweeps on this machine, and prints what was promised and what was measured. The
short forms run in ``make test``. It needs a quiet machine: half of the figures are times.

    ranks     kill -9 of a random rank of two workers, 20 seeded times
    driver    kill -9 of the sweep's own process, 5 times in a sweep
    outage    the MLflow server down for ten minutes in the middle of a trial
    all       the default sweep on two nodes, with a worker, the driver, a node and the MLflow server killed once each,
              against the same sweep undisturbed
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from safetensors.torch import load_file

from orchestrator.records.events import Event
from orchestrator.records.trial_record import TrialRecord
from tests.support.commands import SweepCommand, wait_for
from tests.support.mlflow_server import start_mlflow_server
from tests.support.ray_nodes import RayNodes, free_port, worker_processes
from tests.support.storage import records, running_trial

ONE_TRIAL = (
    "--context-lengths", "1024", "--batch", "2", "--eval-every", "50", "--eval-documents", "4", "--methods", "full",
    "--references",
)  # fmt: skip
Row = tuple[str, str, str]  # fault, promise, measurement


def finish(process: subprocess.Popen, seconds: float = 1800) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def logged_steps(record: TrialRecord) -> list[dict[str, Any]]:
    return [event for event in record.journal.read().events if event.name == "step"]


def weights(storage: Path) -> dict[str, bytes]:
    """The last checkpoint of every trial, for bitwise comparison."""
    found = {}
    for trial in sorted((storage / "trials").iterdir()):
        if checkpoints := sorted(trial.glob("checkpoints/step-*")):
            tensors = load_file(checkpoints[-1] / "tensors.safetensors")
            found |= {f"{trial.name}/{name}": tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return found


def perplexities(storage: Path) -> dict[str, list[tuple[int, int, float]]]:
    return {
        fingerprint: sorted((length, step, event.perplexity) for (length, step), event in record.evals.items())
        for fingerprint, record in records(storage).items()
    }


def ranks(folder: Path) -> Iterator[Row]:
    """Five kills in each of four sweeps of one trial on two workers."""
    kills, interval, steps, random_number = 20, 5, 120, random.Random(0)
    flags = (*ONE_TRIAL, "--steps", str(steps), "--workers", "2", "--checkpoint-every", str(interval))
    began = time.time()
    finish(SweepCommand(folder / "undisturbed", *flags).start())
    undisturbed = time.time() - began
    overheads, redone, done = [], [], 0
    for sweep in range(4):
        command = SweepCommand(folder / f"sweep-{sweep}", *flags, "--max-failures", "10")
        began, process = time.time(), command.start()
        at = sorted(random_number.sample(range(interval + 1, steps - 2), kills // 4))
        for attempt, step in enumerate(at, start=1):
            record = wait_for(lambda: running_trial(command.storage, step), process, f"step {step}")  # noqa: B023
            while len(TrialRecord.of(record.journal).attempts) < attempt:
                time.sleep(0.1)
            victim = random_number.choice(worker_processes(TrialRecord.of(record.journal)))
            os.kill(victim, signal.SIGKILL)
            done += 1
            wait_for(lambda: len(TrialRecord.of(record.journal).attempts) > attempt, process, "the next attempt")  # noqa: B023
        finish(process)
        record = next(iter(records(command.storage).values()))
        step_events = logged_steps(record)
        repeated = len(step_events) - steps
        redone.append(repeated / len(at))
        overheads.append((time.time() - began - undisturbed) / len(at))
        assert record.state == "finished" and weights(command.storage) == weights(folder / "undisturbed")
    yield (
        f"kill -9 of a random rank of two, {done} seeded times",
        f"all finish; at most 25 s each; at most {interval} steps and 2 s of steps redone",
        f"all finished, bit-equal; {statistics.mean(overheads):.1f} s each (worst sweep {max(overheads):.1f}); "
        f"{statistics.mean(redone):.1f} steps redone each (worst sweep {max(redone):.1f})",
    )


def driver(folder: Path) -> Iterator[Row]:
    flags = (
        "--context-lengths", "1024", "--steps", "24", "--batch", "2", "--eval-every", "12", "--eval-documents", "4",
        "--checkpoint-every", "3",
    )  # fmt: skip
    finish(SweepCommand(folder / "undisturbed", *flags).start())
    command, random_number = SweepCommand(folder / "killed", *flags), random.Random(1)
    for _ in range(5):
        process = command.start()
        wait_for(
            lambda: [r for r in records(command.storage).values() if r.state == "running" and r.last_step > 3],
            process, "a trial past its first checkpoint", seconds=300,
        )  # fmt: skip
        time.sleep(random_number.uniform(0, 8))
        process.kill()
        process.wait()
    finish(command.start())
    journals = [record.journal.read().events for record in records(command.storage).values()]
    again = sum(steps_after_the_end(events) for events in journals)
    older = sum(resumed_from_an_older_checkpoint(events) for events in journals)
    same = weights(command.storage) == weights(folder / "undisturbed")
    same = same and perplexities(command.storage) == perplexities(folder / "undisturbed")
    yield (
        "kill -9 of the driver, 5 times in a sweep of six trials",
        "no finished trial runs again; each other resumes from its newest whole checkpoint",
        f"{again} steps trained after a trial's end; {older} resumes from an older checkpoint; weights and "
        + "perplexities "
        + ("bit-equal to an undisturbed sweep" if same else "DIFFER from an undisturbed sweep"),
    )


def steps_after_the_end(events: list[Event]) -> int:
    names = [event.name for event in events]
    return names[names.index("finished") :].count("step") if "finished" in names else 0


def resumed_from_an_older_checkpoint(events: list[Event]) -> int:
    newest, older = 0, 0
    for event in events:
        if event.name == "saved":
            newest = event.step
        if event.name == "resume":
            older += event.step < newest
    return older


def outage(folder: Path, minutes: float = 10) -> Iterator[Row]:
    port = free_port()
    server = start_mlflow_server(folder, port)
    # Longer than the outage even if a step takes 0.2 s (0.27 s on two cores of 2026).
    steps = int(minutes * 60 / 0.2) + 300
    flags = (*ONE_TRIAL, "--steps", str(steps), "--eval-every", "1000", "--tracking-uri", f"http://127.0.0.1:{port}")
    command = SweepCommand(folder / "runs", *flags)
    process = command.start()
    record = wait_for(lambda: running_trial(command.storage, 100), process, "step 100", seconds=300)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    down = time.time()
    time.sleep(minutes * 60)
    still_running = process.poll() is None
    server, back = start_mlflow_server(folder, port), time.time()
    finish(process)
    step_events = logged_steps(record)
    before = statistics.median(event.seconds for event in step_events if event.time < down)
    during = statistics.median(event.seconds for event in step_events if down < event.time < back)
    client = MlflowClient(f"http://127.0.0.1:{port}")
    experiment = client.get_experiment_by_name("longspan")
    runs = client.search_runs([experiment.experiment_id])
    trials = [run for run in runs if run.data.tags["longspan.kind"] == "trial"]
    logged = {point.step for run in trials for point in client.get_metric_history(run.info.run_id, "train/loss")}
    stale = sum(run.info.status == "RUNNING" for run in runs)
    os.killpg(server.pid, signal.SIGKILL)
    yield (
        f"the MLflow server down for {minutes:g} minutes in the middle of a trial",
        "no point lost, step time at most 1% longer, as many runs as trials, none stale",
        f"{steps - len(logged)} of {steps} points lost; step {before * 1e3:.0f} ms before, {during * 1e3:.0f} ms "
        f"during ({during / before - 1:+.1%}); {len(trials)} run of 1 trial, {stale} stale"
        + ("" if still_running else "; the sweep had ended before the server was back"),
    )


def all_at_once(folder: Path) -> Iterator[Row]:
    """The default sweep with every kind of fault.

    A worker, MLflow, a node and the driver are killed in the first run of the command. Then MLflow is started again, a
    node is added, and the command runs again.
    """
    undisturbed, disturbed, port = folder / "undisturbed", folder / "disturbed", free_port()
    cluster = RayNodes()
    try:
        cluster.add(cpus=1)
        cluster.add(cpus=1)
        server = start_mlflow_server(folder, port)
        flags = ("--address", cluster.address, "--tracking-uri", f"http://127.0.0.1:{port}", "--checkpoint-every", "8")
        began = time.time()
        finish(SweepCommand(undisturbed, *flags, environment=cluster.environment).start())
        whole = time.time() - began

        command = SweepCommand(disturbed, *flags, "--experiment", "drill", environment=cluster.environment)
        began, process = time.time(), command.start()
        trained = lambda: sum(record.last_step for record in records(disturbed).values())  # noqa: E731
        running = lambda: [r for r in records(disturbed).values() if r.state == "running" and r.saved_step]  # noqa: E731
        (victim, *_) = wait_for(running, process, "a checkpoint", seconds=300)
        os.kill(victim.started.pid, signal.SIGKILL)
        wait_for(lambda: trained() > 80, process, "80 steps", seconds=600)
        os.killpg(server.pid, signal.SIGKILL)
        (victim, *_) = wait_for(running, process, "a checkpoint", seconds=300)
        cluster.kill(cluster.node_of(victim.started.pid))
        wait_for(lambda: trained() > 160, process, "160 steps", seconds=900)
        process.kill()
        process.wait()
        server = start_mlflow_server(folder, port)
        cluster.add(cpus=1)
        finish(command.start())
        took = time.time() - began
        client = MlflowClient(f"http://127.0.0.1:{port}")
        runs = client.search_runs([client.get_experiment_by_name("drill").experiment_id])
        os.killpg(server.pid, signal.SIGKILL)
    finally:
        cluster.close()
    same = weights(undisturbed) == weights(disturbed) and perplexities(undisturbed) == perplexities(disturbed)
    trials, stale = len(records(disturbed)), sum(run.info.status == "RUNNING" for run in runs)
    kept = sum(run.data.tags["longspan.kind"] == "trial" for run in runs)
    yield (
        "the default sweep on two nodes; a worker, a node, the MLflow server and the driver killed once each",
        "the same perplexities, bit for bit, as undisturbed",
        ("weights and perplexities bit-equal" if same else "weights or perplexities DIFFER")
        + f"; {kept} runs of {trials} trials, {stale} stale; {took:.0f} s against {whole:.0f} s undisturbed",
    )


DRILLS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "ranks": ranks, "driver": driver, "outage": outage, "all": all_at_once
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drills", nargs="*", choices=[*DRILLS, []], help="all of them by default")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.drills or DRILLS:
        with tempfile.TemporaryDirectory(prefix=f"drill-{name}-") as folder:
            began = time.time()
            for row in DRILLS[name](Path(folder)):
                rows.append((*row, f"{(time.time() - began) / 60:.0f} min"))
                print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
