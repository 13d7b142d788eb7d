"""Matrix products of an FP8 base, by each method of a GPU: ``python -m benchmarks.float8_products``.

Shapes of Llama-2-7B at 8,192 tokens, forward (x Wᵀ) and backward (dy W), random numbers with a mean of a tenth of
their standard deviation. For each method its time, and its error against the exact product of the same FP8 numbers (of
64 tokens, in float64). ``FAST_FORWARD`` and ``FAST_BACKWARD`` of workloads/adaptation/float8.py choose between them.
Half a minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.timing import describe, machine, seconds_of, write_json
from workloads.adaptation.float8 import FLOAT8, quantise_rows

TOKENS, CHECKED = 8_192, 64
# (what, K, N)
SHAPES = (
    ("q, k, v, o; forward and backward", 4_096, 4_096),
    ("gate, up forward; down backward", 4_096, 11_008),
    ("down forward; gate, up backward", 11_008, 4_096),
)
MEAN = 0.1


def products(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Each method as a function that returns x Wᵀ in bfloat16, for x (tokens, K) and W (N, K); x is already quantised.

    ``no scales`` is what workloads/adaptation/float8.py uses; its result is not yet scaled.
    """
    (rows, row_scale), (columns, column_scale) = quantise_rows(x), quantise_rows(weight)
    one = torch.ones((), device=x.device)

    def scaled(a: torch.Tensor, b: torch.Tensor, fast: bool) -> torch.Tensor:
        return torch._scaled_mm(rows, columns.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {
        "bfloat16": lambda: x @ weight.t(),
        "no scales, fast sums": lambda: scaled(one, one, True),
        "no scales, exact sums": lambda: scaled(one, one, False),
        "scales of rows, fast sums": lambda: scaled(row_scale, column_scale.t(), True),
        "scales of rows, exact sums": lambda: scaled(row_scale, column_scale.t(), False),
    }


def error(method: str, found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """The relative error on ``CHECKED`` tokens, against the exact product; bfloat16 rounding alone is 0.0017."""
    operands = [x[:CHECKED], weight]
    if method != "bfloat16":
        scaled = [quantise_rows(each) for each in operands]
        unscaled = method.startswith("no scales")
        operands = [each.double() * (1 if unscaled else scale.double()) for each, scale in scaled]
    exact = operands[0].double() @ operands[1].double().t()
    return ((found[:CHECKED].double() - exact).norm() / exact.norm()).item()


def measure(k: int, n: int, tokens: int, device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """By method: TFLOP/s, milliseconds and the error, or why it cannot run here."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = ((torch.randn(rows, k, generator=generator, device=device) + MEAN).bfloat16() for rows in (tokens, n))
    results = {}
    for method, product in products(x, weight).items():
        try:
            relative_error = error(method, product(), x, weight)
            seconds = statistics.median(seconds_of(product, device, warmup=3, repeats=repeats))
        except (RuntimeError, ValueError) as failure:
            results[method] = {"failed": str(failure).splitlines()[0]}
            continue
        results[method] = {"tflops": 2 * tokens * k * n / seconds / 1e12, "ms": seconds * 1e3, "error": relative_error}
    return results


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| products | method | TFLOP/s | ms | error |", "|---|---|---|---|---|"]
    for shape, methods in rows.items():
        for method, row in methods.items():
            shown = f"{row['tflops']:,.0f} | {row['ms']:.3f} | {row['error']:.4f}" if "ms" in row else row["failed"]
            lines.append(f"| {shape} | {method} | {shown} |")
    return "\n".join(lines)


def main(json_file: Annotated[Path, tyro.conf.arg(name="json")] = Path("float8_products.json")) -> None:
    """Times products in FP8 and prints a table.

    Args:
        json_file: the results as JSON.
    """
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.float8_products needs a CUDA device; torch finds none here")
    device = torch.device("cuda", 0)
    facts = machine(device)
    print(describe(facts), flush=True)
    rows = {what: measure(k, n, TOKENS, device, repeats=30) for what, k, n in SHAPES}
    print(table(rows))
    write_json(json_file, {"machine": facts, "tokens": TOKENS, "dtype": str(FLOAT8), "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
