"""Patterns made of groups of consecutive tokens, inside which every head attends causally.

``full``       one group: every key up to the query
``short``      groups [0, G), [G, 2G), ...
``shifted``    groups [0, G/2), [G/2, 3G/2), ...: the same shifted by half a group, with a half group at each end
``s2``         ``short`` in the first half of the heads, ``shifted`` in the others
``s2-layers``  ``short`` in even layers, ``shifted`` in odd ones

Shifted groups do not wrap around. The paper's own code joins the two ends, so that its first half group sees the
future; this is its appendix's variant without that leak. A sequence that is not longer than a group is one causal group
for every head.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from workloads.attention.pattern import Pair, Pattern, causal_pairs, first_shifted_head

if TYPE_CHECKING:
    import torch


def _attends(shifted_share: tuple[float, float], pair: Pair) -> torch.Tensor:
    size = pair.group_size
    first = first_shifted_head(shifted_share[pair.layer % 2], pair.num_heads)
    is_shifted = first == 0 if first in (0, pair.num_heads) else pair.head >= first
    shift = is_shifted * (pair.num_tokens > size) * (size // 2)
    return pair.is_causal & ((pair.query + shift) // size == (pair.key + shift) // size)


def _attended_pairs(
    shifted_share: tuple[float, float], tokens: int, group_size: int, num_heads: int, layer: int
) -> int:
    size = min(group_size, tokens)
    first = first_shifted_head(shifted_share[layer % 2], num_heads)
    unshifted, shifted = _group_pairs(tokens, size, 0), _group_pairs(tokens, size, size // 2 if size < tokens else 0)
    return first * unshifted + (num_heads - first) * shifted


def _group_pairs(tokens: int, size: int, first: int) -> int:
    """Pairs of the groups [0, first), [first, first + size), ...; the last one may be shorter."""
    whole, rest = divmod(tokens - first, size)
    return causal_pairs(first) + whole * causal_pairs(size) + causal_pairs(rest)


def _grouped(name: str, label: str, source: str, shifted_share: tuple[float, float]) -> Pattern:
    return Pattern(
        name=name,
        label=label,
        source=source,
        attends=partial(_attends, shifted_share),
        attended_pairs=partial(_attended_pairs, shifted_share),
        shifted_share=shifted_share,
    )


FULL = Pattern(
    name="full",
    label="full",
    source="Vaswani et al., arXiv 1706.03762, section 3.2.3: masked self-attention of a decoder",
    attends=lambda pair: pair.is_causal,
    attended_pairs=lambda tokens, group_size, num_heads, layer: num_heads * causal_pairs(tokens),
    has_group_size=False,
    shifted_share=(0.0, 0.0),
)
SHORT = _grouped("short", "groups that are not shifted", "LongLoRA section 3.2, pattern 1", (0.0, 0.0))
SHIFTED = _grouped("shifted", "groups that are all shifted", "LongLoRA section 3.2, pattern 2", (1.0, 1.0))
S2 = _grouped(
    "s2",
    "shifted sparse attention (S²-Attn), shifted in half of the heads",
    "LongLoRA section 3.2",
    (0.5, 0.5),
)
S2_LAYERS = _grouped(
    "s2-layers",
    "shifted sparse attention (S²-Attn), shifted in every other layer",
    "LongLoRA section 4.3",
    (0.0, 1.0),
)
