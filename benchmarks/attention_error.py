"""How far every attention backend is from the definition: ``python -m benchmarks.attention_error``, on a CUDA device.

Inputs are bfloat16 numbers; the reference is the dense mask in float64 on the same numbers. An error is the largest
deviation, relative to the reference's largest entry; bfloat16 itself rounds by 0.4 %. Each pattern runs at several
shapes (odd head counts, lengths that are no multiple of the group, right padding, documents) and the worst is shown.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import get_args

import torch
import tyro

from workloads.attention.backends import BACKENDS, attention, choose_backend
from workloads.attention.masks import dense_mask
from workloads.attention.patterns import AttentionPattern
from workloads.config import Attention, AttentionBackend
from workloads.errors import InputError

GROUP_SIZE = 64
HEAD_DIM = 64


@dataclass(frozen=True)
class Case:
    heads: int
    key_value_heads: int
    tokens: int
    lengths: tuple[int, ...] | None = None
    documents: bool = False
    layer: int = 1


CASES = (
    Case(8, 8, 256),
    Case(9, 3, 300),
    Case(9, 3, 300, lengths=(300, 40)),
    Case(8, 2, 300, documents=True),
)


def max_errors(backend: AttentionBackend, name: Attention, case: Case) -> dict[str, float]:
    """The largest relative error of the output and of each gradient.

    Raises:
        InputError: the backend cannot compute this here.
    """
    device = torch.device("cuda")
    pattern = AttentionPattern(name=name, group_size=None if name == "full" else GROUP_SIZE)
    backend = choose_backend(backend, pattern, device, torch.bfloat16, head_dim=HEAD_DIM, documents=case.documents)
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int) -> torch.Tensor:
        # transformers' layout in memory: (batch, tokens, heads, head_dim).
        x = torch.randn(2, case.tokens, heads, HEAD_DIM, generator=generator)
        return x.to(device, torch.bfloat16).transpose(1, 2).requires_grad_()

    inputs = tensor(case.heads), tensor(case.key_value_heads), tensor(case.key_value_heads)
    weights = tensor(case.heads).detach()
    where = {"layer": case.layer, "lengths": case.lengths, "document_ids": None}
    if case.lengths is not None:  # outputs at padding have no meaning
        real = torch.arange(case.tokens, device=device) < torch.tensor(case.lengths, device=device)[:, None]
        weights = weights * real[:, None, :, None]
    if case.documents:
        where["document_ids"] = (torch.arange(2 * case.tokens, device=device) // 70).view(2, -1)

    def results(output: torch.Tensor, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        gradients = torch.autograd.grad(output, arguments, weights.to(output.dtype))
        return [output.detach() * (weights != 0), *gradients]

    found = results(attention(*inputs, pattern, backend=backend, **where), inputs)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    query, key, value = exact
    repeats = case.heads // case.key_value_heads
    mask = dense_mask(pattern, case.heads, case.tokens, device, **where)
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) / HEAD_DIM**0.5
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = results(probabilities @ value.repeat_interleave(repeats, 1), exact)
    return {
        what: ((a.double() - b).abs().max() / b.abs().max()).item()
        for what, a, b in zip(("output", "dQ", "dK", "dV"), found, expected)
    }


def row(backend: AttentionBackend, name: Attention) -> str:
    """One line of the table."""
    try:
        errors = [max_errors(backend, name, case) for case in CASES]
    except InputError as error:
        return f"| {backend} | {name} | {str(error).partition(';')[0].partition('needs ')[2] or error} | | | |"
    worst = [max(error[what] for error in errors) for what in ("output", "dQ", "dK", "dV")]
    return f"| {backend} | {name} | " + " | ".join(f"{error:.4f}" for error in worst) + " |"


def main(backends: tuple[AttentionBackend, ...] = BACKENDS) -> None:
    """Prints the table.

    Args:
        backends: the rows.
    """
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.attention_error needs a CUDA device; torch finds none here")
    began = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bfloat16 against float64, worst of {len(CASES)}")
    print("\n| backend | pattern | output | dQ | dK | dV |\n|---|---|---|---|---|---|")
    for backend in backends:
        for name in get_args(Attention):
            print(row(backend, name), flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    tyro.cli(main)
