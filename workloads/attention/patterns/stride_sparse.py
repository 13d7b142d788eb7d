"""``stride-sparse``: the last G keys in the first half of the heads, every floor(sqrt(N))-th key back in the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from workloads.attention.pattern import Pair, Pattern, window_pairs

if TYPE_CHECKING:
    import torch


def _attends(pair: Pair) -> torch.Tensor:
    distance, strided = pair.distance, pair.in_second_half
    local = ~strided & (distance < pair.group_size)
    return pair.is_causal & (local | (strided & (distance % _floor_sqrt(pair.num_tokens) == 0)))


def _floor_sqrt(number: int | torch.Tensor) -> int | torch.Tensor:
    return math.isqrt(number) if isinstance(number, int) else number.double().sqrt().long()


def _attended_pairs(tokens: int, group_size: int, num_heads: int, layer: int) -> int:
    first = num_heads // 2
    strided = window_pairs(tokens, tokens, math.isqrt(tokens))
    return first * window_pairs(tokens, group_size) + (num_heads - first) * strided


STRIDE_SPARSE = Pattern(
    name="stride-sparse",
    label="stride-sparse",
    source='LongLoRA section 4.3: "local size n/4, stride sqrt(n)", after Child et al. (arXiv 1904.10509); dividing '
    "them over the heads, not the layers, is our reading",
    attends=_attends,
    attended_pairs=_attended_pairs,
)
