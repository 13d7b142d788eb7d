"""The cost of an evaluation before it runs: tokens to forward, FLOPs, and seconds from up to three first forwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from workloads.attention.interface import full_attention
from workloads.engines.engine import Engine
from workloads.evaluation.subject import Subject


@dataclass(frozen=True)
class Cost:
    """Of forward passes: their number, tokens, FLOPs, the part of attention in these, and seconds if measured."""

    forwards: int
    tokens: int
    flops: float
    attention_flops: float
    seconds: float | None = None


def forward_cost(model: nn.Module, counts: Mapping[int, int], seconds: Mapping[int, float] | None = None) -> Cost:
    """The cost of ``counts[length]`` sequences of each length.

    Counted as the LongLoRA paper does (table 11): 2 FLOPs for each weight of a linear layer and token, and 4 N^2 h L
    of full attention over N tokens in L layers of width h, without halving for causality.
    """
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    attention = sum(count * attention_flops(model.config, length) for length, count in counts.items())
    tokens = sum(length * count for length, count in counts.items())
    return Cost(
        forwards=sum(counts.values()),
        tokens=tokens,
        flops=2.0 * linear * tokens + attention,
        attention_flops=attention,
        seconds=sum(count * seconds[length] for length, count in counts.items()) if seconds else None,
    )


def attention_flops(config: Any, length: int) -> float:
    """4 N^2 h L, where h is the width of all query heads together."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4.0 * length**2 * config.num_attention_heads * head_dim * config.num_hidden_layers


def seconds_per_forward(
    model: nn.Module, lengths: Collection[int], engine: Engine, logits_to_keep: int = 0
) -> dict[int, float]:
    """Seconds of one sequence of each length.

    Measured at the shortest and the longest, after one warm-up forward; between them it is a power of the length.

    Args:
        logits_to_keep: of transformers: how many last positions get logits, 0 for all.
    """
    ends = sorted({min(lengths), max(lengths)})
    seconds = []
    model.eval()
    with torch.inference_mode(), full_attention(model), engine.autocast():
        for length in [ends[0], *ends]:
            tokens = torch.zeros(1, length, dtype=torch.long, device=engine.device)
            engine.synchronize()
            started = time.perf_counter()
            model(input_ids=tokens, logits_to_keep=logits_to_keep)
            engine.synchronize()
            seconds.append(time.perf_counter() - started)
    logarithms = np.interp(np.log(list(lengths)), np.log(ends), np.log(seconds[1:]))
    return dict(zip(lengths, np.exp(logarithms).tolist()))


def print_cost(subject: Subject, what: str, counts: dict[int, int], answer_tokens: int, console: Console) -> Cost:
    """Prints the cost of the forwards of ``counts`` (length to number) before they run."""
    seconds = seconds_per_forward(subject.model, counts, subject.engine, logits_to_keep=1 if answer_tokens else 0)
    cost = forward_cost(subject.model, counts, seconds)
    answers = f", and after each an answer of up to {answer_tokens} tokens" if answer_tokens else ""
    console.print(
        f"{what}: {cost.tokens:,} tokens to forward in {cost.forwards:,} sequences{answers}; "
        f"{cost.flops / 1e12:,.2f} TFLOP, {cost.attention_flops / cost.flops:.0%} of it attention; about "
        f"{_duration(cost.seconds)}, by one forward at the shortest and the longest length"
    )
    return cost


@contextmanager
def progress(console: Console, tokens: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; yields a function that counts tokens as done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokens", total=tokens)
        yield lambda done: bar.advance(task, done)


def _duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, as printed."""
    if seconds is None:
        return "an unknown time"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
