"""How much faster several GPUs train than one: ``python -m benchmarks.scaling``, on a machine that has several.

    python -m benchmarks.scaling                                   # one GPU alone, then all with DDP and with ZeRO-2
    python -m benchmarks.scaling --context-length 8192 --group-size 2048

Llama-2-7B's shape, LoRA+, S²-Attn, random weights and tokens. Each worker trains one sequence a step, so twice the
workers train twice the tokens; the step is longspan's own, with the execution settings that it plans for that number of
workers. A step's time is that of the slowest worker, since they wait for each other in it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from transformers import LlamaConfig

from benchmarks.memory import MODELS, start_trial
from benchmarks.processes import Failed, Worker
from benchmarks.timing import GIB, describe, machine, seconds_of, write_json
from benchmarks.training_speed import resolved_settings
from workloads.budget import Device, ModelShape, host_memory, smallest_change_that_fits
from workloads.config import EngineName, ExecutionConfig, TrainingConfig

WARMUP, STEPS = 3, 10
SECONDS = 200.0  # time limit of a measurement: NCCL, compiling, and 13 steps of 2 to 5 s


@dataclass(frozen=True, kw_only=True)
class Point:
    """The result for a number of workers.

    Args:
        seconds: of each counted step.
        tokens_per_second: of all workers together, by the median step.
        peak_gib: the highest of any worker.
        settings: the execution settings that differ from longspan's defaults.
        failure: why it was not measured, in one line.
    """

    workers: int
    engine: EngineName
    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: str | None = None


def configuration(context_length: int, group_size: int, workers: int, on_gpu: bool) -> TrainingConfig:
    return TrainingConfig(
        context_length=context_length,
        method="lora+",
        group_size=group_size,
        steps=WARMUP + STEPS,
        batch=workers,
        precision="bfloat16" if on_gpu else "float32",
        eval_span=context_length,
    )


def planned(config: LlamaConfig, training: TrainingConfig, engine: EngineName, device: torch.device) -> ExecutionConfig:
    """Longspan's defaults with this engine, changed as its plan would to fit each GPU and its share of host memory.

    On a GPU layers are compiled, as in a trial longer than these few steps.

    Raises:
        ValueError: it does not fit.
    """
    known = Device.named(machine(device)["device"])
    if known is None:
        return ExecutionConfig(engine=engine)
    requested = ExecutionConfig(engine=engine, compile_layers="on", offload_activations="auto")
    known = dataclasses.replace(known, host_memory=host_memory() // training.batch)
    fit = smallest_change_that_fits(ModelShape.of(config), training, requested, training.batch, known)
    if fit is None:
        raise ValueError(f"{training.context_length:,} tokens do not fit {known.name} with {engine}")
    return fit.execution


def measure(
    config: LlamaConfig, training: TrainingConfig, engine: EngineName, rank: int, port: int, on_gpu: bool
) -> tuple[list[float], float | None, dict[str, Any]]:
    """One worker's (seconds of each counted step, peak GiB, settings), in its own process."""
    workers = training.batch
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    if on_gpu:
        torch.cuda.set_device(device)
    if workers > 1:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=workers,
            timeout=timedelta(seconds=SECONDS),
        )
    execution = planned(config, training, engine, device)
    with tempfile.TemporaryDirectory() as folder:
        trial, model = start_trial(config, training, execution, device, Path(folder))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = seconds_of(lambda: trial.train_step(model), device, WARMUP, STEPS)
        peak = torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None
    if workers > 1:
        dist.destroy_process_group()
    return seconds, peak, resolved_settings(trial)


def point(config: LlamaConfig, training: TrainingConfig, engine: EngineName, on_gpu: bool) -> Point:
    """Measures with this many workers, each in its own process."""
    workers = training.batch
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [Worker(measure) for _ in range(workers)]
    for rank, process in enumerate(processes):
        process.begin(config, training, engine, rank, port, on_gpu)
    try:
        until = time.monotonic() + SECONDS
        results = [process.result(max(0.0, until - time.monotonic())) for process in processes]
    except Failed as failure:
        return Point(workers=workers, engine=engine, failure=str(failure))
    finally:
        for process in processes:
            process.close()
    # The slowest worker of each step; all are about the same.
    seconds = [max(each) for each in zip(*(seconds for seconds, _, _ in results), strict=True)]
    return Point(
        workers=workers,
        engine=engine,
        seconds=seconds,
        tokens_per_second=workers * training.context_length / statistics.median(seconds),
        peak_gib=max(peak for _, peak, _ in results) if on_gpu else None,
        settings=results[0][2],
    )


def table(points: Sequence[Point]) -> str:
    """Each point compared with a single worker, which comes first."""
    head = ["| workers | engine | tokens/s | x one | ms a step | peak GiB | settings |", "|---|" + "---|" * 6]
    return "\n".join([*head, *(line(each, points[0]) for each in points)])


def line(point: Point, alone: Point) -> str:
    if point.failure:
        return f"| {point.workers} | {point.engine} | {point.failure} | | | | |"
    times = f"{point.tokens_per_second / alone.tokens_per_second:.2f}" if alone.tokens_per_second else "-"
    peak = f"{point.peak_gib:.1f}" if point.peak_gib else "-"
    settings = ", ".join(f"{name} {value}" for name, value in point.settings.items()) or "-"
    milliseconds = f"{1e3 * statistics.median(point.seconds):,.0f}"
    return (
        f"| {point.workers} | {point.engine} | {point.tokens_per_second:,.0f} | {times} | {milliseconds} | {peak} | "
        f"{settings} |"
    )


def main(
    context_length: int = 32_768,
    group_size: int = 8_192,
    engines: tuple[EngineName, ...] = ("ddp", "zero2"),
    json_file: Annotated[Path, tyro.conf.arg(name="json")] = Path("scaling.json"),
) -> None:
    """Measures one GPU and then all of them together, and prints a table.

    Args:
        context_length: tokens of a sequence, of which each worker trains one a step.
        group_size: of S²-Attn, in tokens.
        engines: used when all GPUs train together.
        json_file: the results.
    """
    count = torch.cuda.device_count()
    if count < 2:
        raise SystemExit(f"benchmarks.scaling needs two CUDA devices or more; torch finds {count} here")
    facts = machine(torch.device("cuda", 0)) | {"devices": count}
    print(describe(facts), flush=True)
    points = []
    for workers, engine in itertools.chain([(1, "ddp")], ((count, engine) for engine in engines)):
        training = configuration(context_length, group_size, workers, on_gpu=True)
        points.append(point(MODELS["7B"], training, engine, on_gpu=True))
        print(line(points[-1], points[0]), flush=True)
        write_json(json_file, {"machine": facts, "model": "Llama-2-7B", "points": [asdict(each) for each in points]})
    print(f"\nLlama-2-7B's shape, LoRA+, S², {context_length:,} tokens a worker\n\n{table(points)}\n{json_file}")


if __name__ == "__main__":
    tyro.cli(main)
