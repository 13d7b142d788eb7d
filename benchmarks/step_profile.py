"""Where a training step's time goes, by torch's profiler: each GPU kernel is assigned to one part of the step.

A kernel is recognised by its name, else by the operator that launched it: one with an input as wide as the vocabulary
belongs to the output layer or the loss. A fused kernel is not divided. Work on other streams (copies of offloaded
activations) counts only while the computing stream waits for it, as idle time.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ATTENTION, PRODUCTS, LOSS, OPTIMISER, COPIES, ELEMENTWISE, IDLE = (
    "attention",
    "matrix products",
    "output layer and loss",
    "optimiser and clipping",
    "copies, casts and zeros",
    "norms, activations, rotary positions, sums",
    "idle: the device waits for the host",
)
PARTS = (PRODUCTS, ATTENTION, ELEMENTWISE, LOSS, OPTIMISER, COPIES, IDLE)
# The first that matches. FlashAttention's and cuDNN's kernels are built from the same parts as matrix products and
# carry their names too; cuBLAS' on Hopper are called nvjet.
BY_NAME = (
    (ATTENTION, r"flash|fmha|sdpa|attention|mha_"),
    (OPTIMISER, r"multi_tensor|adam|lp_?norm"),
    (LOSS, r"softmax|nll|cross_entropy"),
    (PRODUCTS, r"gemm|nvjet|cutlass|xmma|cublas|gemv|splitk|triton_tem_"),
    (COPIES, r"^(?!triton_).*(copy|memcpy|memset|fill|catarray)"),  # the compiler's fused kernels name their casts
)
LONGEST = 12


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Where a step's time goes.

    Args:
        parts: milliseconds a step by part (:data:`PARTS`); time without a kernel is idle.
        longest: milliseconds a step of the longest kernels, all calls together, by name.
    """

    parts: dict[str, float]
    longest: dict[str, float]


def step_profile(step: Callable[[], Any], vocab_size: int, steps: int = 2) -> StepProfile:
    """Profiles a warm step, run ``steps`` times on a CUDA device."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiled:
        before.record()
        for _ in range(steps):
            step()
        after.record()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    return of_trace(events, vocab_size, before.elapsed_time(after), steps)


def of_trace(events: Sequence[dict[str, Any]], vocab_size: int, milliseconds: float, steps: int) -> StepProfile:
    """The profile from a trace.

    Args:
        events: of a profiler's trace, in Chrome's format.
        milliseconds: from the start of the first step to the end of the last.
    """
    given = {
        event["args"]["External id"]: event["args"].get("Input Dims", [])
        for event in events
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    streams = Counter(event.get("tid") for event in on_device)
    computing = max(streams, key=streams.get, default=None)
    on_device = [event for event in on_device if event.get("tid") == computing]
    parts, kernels = Counter(dict.fromkeys(PARTS, 0.0)), Counter()
    for event in on_device:
        shapes = given.get(event.get("args", {}).get("External id"), [])
        parts[part_of(event["name"], shapes, vocab_size)] += event["dur"] / 1e3 / steps
        kernels[event["name"]] += event["dur"] / 1e3 / steps
    busy = reached = 0.0
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in on_device):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    parts[IDLE] = max(0.0, milliseconds - busy / 1e3) / steps
    return StepProfile(dict(parts), dict(kernels.most_common(LONGEST)))


def part_of(kernel: str, shapes: list, vocab_size: int) -> str:
    """The part of the step that a kernel belongs to.

    Args:
        shapes: of the inputs of the operator that launched the kernel; empty if unknown.
    """
    part = next((part for part, name in BY_NAME if re.search(name, kernel, re.IGNORECASE)), ELEMENTWISE)
    # Logits, their gradient and the output layer's transposed weight; the embeddings have the vocabulary first.
    of_logits = any(isinstance(shape, list) and shape[-1:] == [vocab_size] for shape in shapes)
    return LOSS if of_logits and part in (PRODUCTS, COPIES, ELEMENTWISE) else part


def table(parts: dict[str, float]) -> str:
    total = sum(parts.values())
    lines = ["| part of a step | ms | share |", "|---|---|---|"]
    lines += [f"| {part} | {parts[part]:,.1f} | {parts[part] / total:.1%} |" for part in PARTS]
    return "\n".join([*lines, f"| all | {total:,.1f} | |"])
