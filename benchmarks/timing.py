"""Shared by the speed benchmarks: timing of a call, and the machine and versions that a figure belongs to."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from workloads.files.json_text import json_text

GIB = 2**30
PACKAGES = ("transformers", "peft", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel", "unsloth")


def seconds_of(call: Callable[[], Any], device: torch.device, warmup: int, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, after ``warmup`` uncounted ones.

    Timed by events on the device's stream, without waiting in between; on a CPU by the clock.
    """
    for _ in range(warmup):
        call()
    if device.type == "cpu":
        clock = [time.perf_counter()]
        for _ in range(repeats):
            call()
            clock.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(clock)]
    pairs = []
    for _ in range(repeats):
        pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        pairs[-1][0].record()
        call()
        pairs[-1][1].record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    facts: dict[str, Any] = {"device": "CPU", "python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(facts: dict[str, Any]) -> str:
    """One line; packages that are not installed come last."""
    missing = [name for name, value in facts.items() if value is None]
    known = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return known + (f"; not installed: {', '.join(missing)}" if missing else "")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the whole file or nothing: a process killed while writing leaves the earlier content."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json_text(content, indent=1))
    partial.replace(path)
