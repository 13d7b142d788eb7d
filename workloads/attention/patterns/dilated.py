"""``dilated``: the G keys query, query - d, query - 2d, ...; d is 1 in the first half of the heads, 2 in the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workloads.attention.pattern import Pair, Pattern, window_pairs

if TYPE_CHECKING:
    import torch


def _attends(pair: Pair) -> torch.Tensor:
    dilation = 1 + pair.in_second_half * 1
    distance = pair.distance
    return pair.is_causal & (distance % dilation == 0) & (distance < pair.group_size * dilation)


def _attended_pairs(tokens: int, group_size: int, num_heads: int, layer: int) -> int:
    first = num_heads // 2
    return first * window_pairs(tokens, group_size) + (num_heads - first) * window_pairs(tokens, group_size, 2)


DILATED = Pattern(
    name="dilated",
    label="dilated",
    source='LongLoRA section 4.3: "dilation 1 to 2 evenly across heads"; one dilation for each half is our reading',
    attends=_attends,
    attended_pairs=_attended_pairs,
)
