"""Rotary positions whose frequencies depend on the length of a sequence: dynamic NTK and LongRoPE.

Stock transformers computes them from the longest sequence of a batch, and with dynamic NTK keeps those of the longest
sequence since the model was loaded. A loss then depends on what was computed before, and on how a batch is divided.
:func:`by_sequence` makes them depend on each sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

BY_LENGTH = ("dynamic", "longrope")  # rope types


class RotaryBySequence(nn.Module):
    """A stock rotary module, called for one sequence at a time and as if it had just been loaded.

    Args:
        stock: transformers' module.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self.fixed_length: int | None = None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each (sequences, N, rotated dimensions).

        Args:
            x: of the result's device and dtype.
            position_ids: (sequences, N); a sequence's highest position, plus one, is its length.
        """
        cosines, sines = zip(*(self._of_sequence(x, positions) for positions in position_ids))
        return torch.stack(cosines), torch.stack(sines)

    def _of_sequence(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stock, given = self.stock, len(positions)
        if self.fixed_length:
            positions = torch.cat([positions, positions.new_tensor([self.fixed_length - 1])])
        if stock.rope_type == "dynamic":
            stock.register_buffer("inv_freq", stock.original_inv_freq.clone(), persistent=False)
            stock.max_seq_len_cached = stock.original_max_seq_len
        cosine, sine = stock(x, positions[None])
        return cosine[0, :given], sine[0, :given]


def by_sequence(model: nn.Module) -> None:
    """Makes rotary positions that depend on a length depend on each sequence's own; in place, and nothing else."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if getattr(module, "rope_type", None) in BY_LENGTH and not isinstance(parent, RotaryBySequence):
                setattr(parent, name, RotaryBySequence(module))


def padded_inputs(model: nn.Module, mask: torch.Tensor | None) -> dict[str, Any]:
    """The arguments of a model's call for a batch that is padded on the right.

    Args:
        mask: (sequences, N), false at padding; None without padding.
    """
    if mask is None or not any(isinstance(module, RotaryBySequence) for module in model.modules()):
        return {"attention_mask": mask}
    positions = torch.arange(mask.shape[1], device=mask.device)
    return {"attention_mask": mask, "position_ids": positions * mask}


@contextmanager
def fixed_length(model: nn.Module, length: int) -> Iterator[None]:
    """A context in which frequencies are those of sequences of ``length`` tokens, while a sequence grows to it.

    Keys in a cache would otherwise have been rotated by those of a shorter sequence.
    """
    rotary = [module for module in model.modules() if isinstance(module, RotaryBySequence)]
    for module in rotary:
        module.fixed_length = length
    try:
        yield
    finally:
        for module in rotary:
            module.fixed_length = None
