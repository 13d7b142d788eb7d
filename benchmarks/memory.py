"""Predicted and measured memory and speed side by side: ``python -m benchmarks.memory``, on a CUDA device.

Each point is a model of random weights that takes two steps of longspan's training loop, one sequence each. Points
that workloads/budget predicts not to fit the device are left out. Ten minutes are enough on an H200.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from benchmarks.live import LiveTensors
from workloads.budget import Device, Loop, Memory, ModelShape, memory, step_seconds
from workloads.config import ExecutionConfig, Method, TrainingConfig
from workloads.engines.choose import make_engine
from workloads.files.json_text import json_text
from workloads.training.loop import Emit, Trial
from workloads.training.setup import prepare_model

GIB = 2**30
# Llama-2-7B and Llama-3.2-1B, from their configurations.
MODELS = {
    "7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    ),
    "1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Point:
    model: str
    method: Method
    context_length: int
    checkpointing: bool


POINTS = (
    Point("1B", "lora", 8192, False),
    Point("1B", "lora", 32768, True),
    Point("1B", "lora+", 8192, False),
    Point("1B", "lora+", 32768, True),
    Point("1B", "lora+", 65536, True),
    Point("1B", "full", 8192, False),
    Point("1B", "full", 32768, True),
    Point("7B", "lora", 8192, False),
    Point("7B", "lora", 32768, True),
    Point("7B", "lora+", 8192, True),
    Point("7B", "lora+", 8192, False),
    Point("7B", "lora+", 32768, True),
    Point("7B", "lora+", 65536, True),
    Point("7B", "full", 8192, True),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One point: bytes and tokens/s, predicted and measured.

    ``measured`` is None if memory ran out; a speed is None if it is unknown.
    """

    point: Point
    predicted: Memory
    measured: int | None
    predicted_speed: float | None
    measured_speed: float | None


class RandomTokens:
    """Stands in for a corpus in the training loop."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def train_batch(self, step: int, batch: int, context_length: int, seed: int) -> np.ndarray:
        return np.random.default_rng((seed, step)).integers(self.vocab_size, size=(batch, context_length))


def configure(point: Point, on_gpu: bool) -> tuple[TrainingConfig, ExecutionConfig]:
    training = TrainingConfig(
        context_length=point.context_length,
        method=point.method,
        group_size=point.context_length // 4,
        steps=2,
        batch=1,
        precision="bfloat16" if on_gpu else "float32",
        eval_span=point.context_length,
    )
    # No evaluation is measured, so the smallest.
    return training, ExecutionConfig(gradient_checkpointing="all" if point.checkpointing else 0, eval_batch_tokens=1)


def start_trial(
    model_config: PretrainedConfig,
    training: TrainingConfig,
    execution: ExecutionConfig,
    device: torch.device,
    folder: Path,
    emit: Emit = lambda event, **fields: None,
) -> tuple[Trial, nn.Module]:
    """A trial on random weights, before its first step, and the module for ``Trial.train_step``.

    It writes a checkpoint into ``folder`` only on request.
    """
    engine = make_engine(execution, device, training.precision)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(model_config, dtype=engine.dtype)
    model.config.use_cache = False
    model = prepare_model(model, training, engine, execution)
    trial = Trial(model, training, execution, RandomTokens(model_config.vocab_size), folder, engine, emit)
    training_model = trial.start()
    training_model.train()
    return trial, training_model


def measure(
    model_config: PretrainedConfig, training: TrainingConfig, execution: ExecutionConfig, device: torch.device
) -> tuple[int, float]:
    """(peak bytes of two steps, tokens/s of the second). On a CPU the peak is that of live tensors."""
    events = []
    with tempfile.TemporaryDirectory() as folder:
        trial, training_model = start_trial(
            model_config, training, execution, device, Path(folder), lambda event, **fields: events.append(fields)
        )
        live = LiveTensors() if device.type == "cpu" else None
        if live:
            live.start_with(*trial.model.parameters(), *trial.model.buffers())
        else:
            torch.cuda.reset_peak_memory_stats(device)
        with live or contextlib.nullcontext():
            for _ in range(training.steps):
                trial.train_step(training_model)
            trial.finish_step()
    peak = live.peak if live else torch.cuda.max_memory_allocated(device)
    return peak, events[-1]["tokens_per_second"]


def compare(point: Point, model_config: PretrainedConfig, device: torch.device) -> Result | None:
    """A point, predicted and measured; None if it is predicted not to fit."""
    on_gpu = device.type == "cuda"
    training, execution = configure(point, on_gpu)
    shape = ModelShape.of(model_config)
    known = Device.named(torch.cuda.get_device_name(device)) if on_gpu else None
    predicted = memory(shape, training, execution, loop=Loop.of(shape, training, execution, device=known))
    if on_gpu and predicted.total > torch.cuda.get_device_properties(device).total_memory:
        return None
    seconds = step_seconds(shape, training, execution, 1, known) if known else None
    try:
        peak, speed = measure(model_config, training, execution, device)
    except torch.OutOfMemoryError:
        peak, speed = None, None
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return Result(point, predicted, peak, training.context_length / seconds if seconds else None, speed)


def table(results: Iterable[Result]) -> str:
    lines = [
        "| model | method | context | checkpointing | predicted GiB | measured GiB | deviation | at | "
        "predicted tokens/s | measured tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        point, predicted = result.point, result.predicted.allocated
        deviation = f"{predicted / result.measured - 1:+.1%}" if result.measured else "out of memory"
        measured = f"{result.measured / GIB:.2f}" if result.measured else "-"
        speeds = [f"{x:,.0f}" if x else "-" for x in (result.predicted_speed, result.measured_speed)]
        lines.append(
            f"| {point.model} | {point.method} | {point.context_length:,} | {'yes' if point.checkpointing else 'no'} | "
            f"{predicted / GIB:.2f} | {measured} | {deviation} | {result.predicted.moment} | {' | '.join(speeds)} |"
        )
    return "\n".join(lines)


def as_json(results: Iterable[Result], device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = [dataclasses.asdict(result) | {"predicted_bytes": result.predicted.allocated} for result in results]
    return json_text({"device": name, "torch": torch.__version__, "points": rows}, indent=1)


def main(json_file: Path = Path("memory.json")) -> None:
    """Measures every point and prints a table.

    Args:
        json_file: the results as JSON.
    """
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.memory needs a CUDA device; torch finds none here")
    device = torch.device("cuda", 0)
    results = []
    for point in POINTS:
        result = compare(point, MODELS[point.model], device)
        if result is None:
            print(f"{point}: predicted not to fit, left out", flush=True)
            continue
        results.append(result)
        print(table([result]).splitlines()[-1], flush=True)
    print(f"\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n\n{table(results)}")
    json_file.write_text(as_json(results, device), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
