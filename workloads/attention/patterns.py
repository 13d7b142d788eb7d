"""What each attention pattern is: one dense boolean mask per pattern, slow and obvious.

Every fast path is tested against these masks. ``True`` at ``[head, query, key]``: the query attends to the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from workloads.errors import InputError

PatternName = Literal["full", "s2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPattern:
    """A pattern and its settings, as a model's configuration carries them.

    Args:
        name: ``full`` (causal attention) or ``s2`` (shifted sparse attention, LongLoRA section 3.2).
        group_size: tokens in a group of ``s2``: even and positive. ``None`` for ``full``.
    """

    name: PatternName = "full"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(PatternName):
            raise InputError(f"attention pattern {self.name!r} is unknown; expected one of {get_args(PatternName)}")
        if self.name == "s2":
            check_group_size(self.group_size)
        elif self.group_size is not None:
            raise InputError(f"group size {self.group_size} has no meaning for the pattern {self.name!r}; leave it out")


def check_group_size(group_size: int | None) -> None:
    """Raises InputError unless ``group_size`` is an even, positive number of tokens."""
    if not isinstance(group_size, int) or group_size <= 0 or group_size % 2:
        raise InputError(
            f"group size {group_size!r}: shifted sparse attention needs an even, positive number of tokens, "
            "since half of the heads shift by half a group"
        )


def dense_mask(pattern: AttentionPattern, num_heads: int, num_tokens: int, device=None) -> torch.Tensor:
    """The definition of ``pattern``: a boolean mask of shape (num_heads, num_tokens, num_tokens)."""
    position = torch.arange(num_tokens, device=device)
    causal = position[:, None] >= position[None, :]
    if pattern.name == "full" or num_tokens <= pattern.group_size:
        # A sequence that is not longer than a group is one causal group for every head.
        return causal.expand(num_heads, -1, -1)

    # S²-Attn: heads before num_heads // 2 keep groups [0, G), [G, 2G), ...; the others have theirs moved by half a
    # group, [0, G/2), [G/2, 3G/2), ..., with a half group at each end and no wrap-around (the published roll-based
    # code joins the two ends, so that its first half group sees the future).
    shift = torch.zeros(num_heads, 1, dtype=torch.long, device=device)
    shift[num_heads // 2 :] = pattern.group_size // 2
    group = (position + shift) // pattern.group_size
    return causal & (group[:, :, None] == group[:, None, :])
