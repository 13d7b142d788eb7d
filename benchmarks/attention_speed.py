"""Attention alone, forward and backward: longspan's backends and the published recipe.

``python -m benchmarks.attention_speed`` on a CUDA device; about 2 minutes on an H200.

One sequence of random bfloat16 numbers in transformers' layout in memory: (batch, tokens, heads, head_dim). Medians
by device events.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.baselines import published_s2
from benchmarks.timing import describe, machine, seconds_of, write_json
from workloads.attention.backends import BACKENDS, attention, choose_backend
from workloads.attention.patterns import AttentionPattern
from workloads.budget import attended_pairs
from workloads.budget.flops import BACKWARD_BY_FORWARD, RECOMPUTED_SCORES
from workloads.errors import InputError

WARMUP, REPEATS = 5, 20
PUBLISHED = "published S²"
COUNTING = (
    f"Median of {REPEATS} calls after {WARMUP}, by device events. TFLOP/s: of the pairs that attend, causally inside "
    "groups (for shifted heads, two of them are half groups); backward counts 2.5 times the forward, since kernels "
    "recompute scores. Published S²: rolled, cut, FlashAttention-2, rolled back; its first half group attends to the "
    "last, so it is not the same function."
)


@dataclass(frozen=True)
class Case:
    """A measured case.

    Args:
        group_size: of S²-Attn; None: full attention.
        must_reach, stretch: target milliseconds, forward and backward.
    """

    tokens: int
    group_size: int | None
    heads: int = 32
    key_value_heads: int = 32
    head_dim: int = 128
    must_reach: float | None = None
    stretch: float | None = None

    @property
    def pattern(self) -> AttentionPattern:
        return AttentionPattern(name="s2" if self.group_size else "full", group_size=self.group_size)

    @property
    def forward_flops(self) -> float:
        return 4.0 * self.head_dim * attended_pairs(self.pattern.name, self.group_size, self.heads, self.tokens)


CASES = (
    Case(32_768, 8_192, must_reach=16.5, stretch=15),
    Case(32_768, 2_048, must_reach=6.5, stretch=5),
    Case(98_304, 24_576),
    Case(98_304, 8_192),
    Case(32_768, None),
    Case(32_768, 8_192, key_value_heads=8),
    Case(32_768, 2_048, key_value_heads=8),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a case.

    Args:
        implementation: a backend of longspan, or the published recipe.
        forward, both: milliseconds of the forward pass, and of forward and backward.
        failure: the error, if nothing was measured.
    """

    case: Case
    implementation: str
    forward: float | None = None
    both: float | None = None
    failure: str | None = None

    @property
    def rates(self) -> tuple[float, float]:
        """TFLOP/s, of the forward pass and of forward and backward."""
        flops = self.case.forward_flops
        with_backward = flops * (1 + BACKWARD_BY_FORWARD + RECOMPUTED_SCORES)
        return flops / self.forward / 1e9, with_backward / self.both / 1e9


def implementations(case: Case, device: torch.device) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    """(name, function of query, key, value) of what can run here; FlexAttention is for other patterns."""
    if case.group_size:

        def published(*qkv: torch.Tensor) -> torch.Tensor:
            return published_s2(*qkv, case.group_size).transpose(1, 2)

        yield PUBLISHED, published
    for backend in BACKENDS:
        try:
            choose_backend(backend, case.pattern, device, torch.bfloat16, head_dim=case.head_dim)
        except InputError:
            continue
        if backend != "flex":
            yield backend, lambda *qkv, backend=backend: attention(*qkv, case.pattern, backend=backend)


def measure(case: Case, implementation: str, compute: Callable[..., torch.Tensor], device: torch.device) -> Row:
    """One line of the table."""

    def tensor(heads: int) -> torch.Tensor:
        x = torch.randn(1, case.tokens, heads, case.head_dim, device=device, dtype=torch.bfloat16)
        return x.transpose(1, 2)

    qkv = [tensor(heads).requires_grad_() for heads in (case.heads, case.key_value_heads, case.key_value_heads)]
    gradient = tensor(case.heads)

    def both() -> None:
        torch.autograd.grad(compute(*qkv), qkv, gradient)

    try:
        medians = [
            1e3 * statistics.median(seconds_of(call, device, WARMUP, REPEATS)) for call in (lambda: compute(*qkv), both)
        ]
    except RuntimeError as error:  # out of memory is one
        return Row(case=case, implementation=implementation, failure=str(error).partition("\n")[0])
    return Row(case=case, implementation=implementation, forward=medians[0], both=medians[1])


HEADER = (
    "tokens", "group", "heads", "implementation", "forward ms", "forward and backward ms", "must reach", "stretch",
    "x published S²", "forward TFLOP/s", "both TFLOP/s",
)  # fmt: skip


def line(row: Row, rows: list[Row]) -> str:
    case = row.case
    cells = [f"{case.tokens:,}", f"{case.group_size:,}" if case.group_size else "full"]
    cells += [f"{case.heads}/{case.key_value_heads}", row.implementation]
    if row.failure:
        cells += ["-", row.failure, *["-"] * 5]
    else:
        published = next(
            (other.both for other in rows if other.case == case and other.implementation == PUBLISHED), None
        )
        cells += [
            f"{row.forward:.2f}",
            f"{row.both:.2f}",
            *(f"{x:g}" if x else "-" for x in (case.must_reach, case.stretch)),
        ]
        cells += [f"{published / row.both:.2f}" if published else "-", *(f"{rate:.0f}" for rate in row.rates)]
    return "| " + " | ".join(cells) + " |"


def head() -> str:
    return "| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER)


def as_json(rows: list[Row], facts: dict[str, Any]) -> dict[str, Any]:
    return {"machine": facts, "counting": COUNTING, "rows": [dataclasses.asdict(row) for row in rows]}


def main(json_file: Annotated[Path, tyro.conf.arg(name="json")] = Path("attention_speed.json")) -> None:
    """Measures attention alone and prints a table.

    Args:
        json_file: the results as JSON, written after every line.
    """
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.attention_speed needs a CUDA device; torch finds none here")
    began = time.monotonic()
    device = torch.device("cuda", 0)
    facts, rows = machine(device), []
    print(f"{describe(facts)}\n{COUNTING}\n\n{head()}", flush=True)
    for case in CASES:
        for name, compute in implementations(case, device):
            rows.append(measure(case, name, compute, device))
            print(line(rows[-1], rows), flush=True)
            write_json(json_file, as_json(rows, facts))
    print(f"\n{time.monotonic() - began:.0f} s; {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
