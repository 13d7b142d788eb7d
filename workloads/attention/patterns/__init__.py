"""The registry of attention patterns, and a pattern with its settings. Imports no torch.

``shifted_sparse`` full, short, shifted, s2, s2-layers
``dilated``        dilated
``block_sparse``   block-sparse
``stride_sparse``  stride-sparse
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workloads.attention.pattern import Pattern
from workloads.attention.patterns.block_sparse import BLOCK_SPARSE
from workloads.attention.patterns.dilated import DILATED
from workloads.attention.patterns.shifted_sparse import FULL, S2, S2_LAYERS, SHIFTED, SHORT
from workloads.attention.patterns.stride_sparse import STRIDE_SPARSE
from workloads.errors import InputError
from workloads.registry import Registry

PATTERNS = Registry("attention pattern", (S2, FULL, S2_LAYERS, SHORT, SHIFTED, DILATED, BLOCK_SPARSE, STRIDE_SPARSE))
# For type checkers and the command line; a test holds it equal to the registry.
Attention = Literal["s2", "full", "s2-layers", "short", "shifted", "dilated", "block-sparse", "stride-sparse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPattern:
    """A pattern and its settings, as a model's configuration carries them.

    Args:
        name: of the pattern in ``PATTERNS``.
        group_size: the pattern's size in tokens (of a group, window or block): even and positive. None for ``full``.

    Raises:
        InputError: there is no such pattern, or the group size does not suit it.
    """

    name: Attention = "full"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if PATTERNS[self.name].has_group_size:
            check_group_size(self.group_size)
        elif self.group_size is not None:
            raise InputError(f"group size {self.group_size} has no meaning for the pattern {self.name!r}; leave it out")

    @property
    def definition(self) -> Pattern:
        """What the pattern is."""
        return PATTERNS[self.name]


def check_group_size(group_size: int | None) -> None:
    """Raises InputError unless ``group_size`` is an even, positive number of tokens."""
    if not isinstance(group_size, int) or group_size <= 0 or group_size % 2:
        raise InputError(
            f"group size {group_size!r}: expected an even, positive number of tokens, since shifted groups are moved "
            "by half a group"
        )
