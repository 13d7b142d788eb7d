"""What a pattern is: the predicate that defines it, and every fact about it that other modules need. Imports no torch.

The patterns themselves are in ``patterns/``. Names and settings are those of LongLoRA (arXiv 2309.12307) section 4.3
and its figure of sparse attention variants. Where the paper leaves a definition open, the pattern's file says which
reading it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and a key of one head, or tensors of many pairs.

    Args:
        head, query, key: integer tensors (an index, positions in the sequence) that broadcast against each other.
        num_heads: query heads of the layer.
        num_tokens: tokens of the sequence without padding, at least 1; a tensor that broadcasts if sequences differ.
        group_size: the pattern's size in tokens; 0 for a pattern that has none.
        layer: the layer's index, from 0.
    """

    head: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    num_heads: int
    num_tokens: int | torch.Tensor
    group_size: int
    layer: int = 0

    @property
    def is_causal(self) -> torch.Tensor:
        """Whether the key is not later than the query."""
        return self.key <= self.query

    @property
    def distance(self) -> torch.Tensor:
        """Tokens from the key to the query; negative where the key is later."""
        return self.query - self.key

    @property
    def in_second_half(self) -> torch.Tensor:
        """Whether the head is of the second half: the first ``num_heads // 2`` are one half, the others (5 of 9) it."""
        return self.head >= self.num_heads // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """An attention pattern. Every pattern is causal.

    Args:
        name: the name that ``--attention`` takes.
        label: the name in reports and model cards.
        source: where it is defined, and what of the definition is our reading.
        attends: whether a query attends to a key: the one definition, which every backend is tested against. Returns a
            boolean tensor of the pair's broadcast shape (of query and key alone where the heads do not differ).
        attended_pairs: how many pairs attend in a sequence without padding, over all heads of a layer, in closed form:
            of (tokens, group_size, num_heads, layer). FLOPs follow from it.
        has_group_size: whether it has a size in tokens (of a group, window or block).
        shifted_share: of a pattern in which every head attends causally inside groups of consecutive tokens, the share
            of heads whose groups are shifted by half a group, in (even, odd) layers; those are the last heads. None of
            other patterns.
    """

    name: str
    label: str
    source: str
    attends: Callable[[Pair], torch.Tensor]
    attended_pairs: Callable[[int, int, int, int], int]
    has_group_size: bool = True
    shifted_share: tuple[float, float] | None = None

    @property
    def is_grouped(self) -> bool:
        """Whether every head attends causally inside groups, so that kernels for causal attention need no mask."""
        return self.shifted_share is not None

    @property
    def varies_by_layer(self) -> bool:
        """Whether even and odd layers attend differently."""
        return self.shifted_share is not None and self.shifted_share[0] != self.shifted_share[1]

    def shifted_share_in(self, layer: int) -> float:
        """The share of a layer's heads whose groups are shifted; 0 for a pattern without groups."""
        return self.shifted_share[layer % 2] if self.shifted_share else 0.0

    def first_shifted_head(self, num_heads: int, layer: int) -> int:
        """Query heads from this index on have shifted groups in the layer; ``num_heads`` where none have."""
        return first_shifted_head(self.shifted_share_in(layer), num_heads)


def first_shifted_head(shifted_share: float, num_heads: int) -> int:
    """The first of the last heads that make up a share; ``num_heads`` for a share of 0."""
    return int(num_heads * (1 - shifted_share))


def causal_pairs(tokens: int) -> int:
    """How many pairs attend in causal attention over ``tokens`` tokens."""
    return tokens * (tokens + 1) // 2


def window_pairs(tokens: int, size: int, dilation: int = 1) -> int:
    """How many pairs attend where a query sees the keys query, query - d, query - 2d, ..., at most ``size`` of them.

    Query number q has q // d + 1 of them in all.
    """
    growing = min(tokens, size * dilation)
    whole, rest = divmod(growing, dilation)
    return dilation * causal_pairs(whole) + rest * (whole + 1) + (tokens - growing) * size
