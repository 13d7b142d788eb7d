"""What each attention pattern is: one predicate, and the dense boolean mask it makes, slow and obvious.

:func:`attends` is the only definition. :func:`dense_mask` writes it out for every head, query and key; every backend is
tested against that mask. Names and settings are those of LongLoRA (arXiv 2309.12307) section 4.3 and its figure of
sparse attention variants. Where the paper leaves a definition open, the docstring of :func:`attends` says which reading
is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from workloads.config import Attention
from workloads.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPattern:
    """A pattern and its settings, as a model's configuration carries them.

    Args:
        name: one of ``workloads.config.Attention``; :func:`attends` defines them.
        group_size: the pattern's size in tokens (of a group, window or block): even and positive. None for ``full``.
    """

    name: Attention = "full"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(Attention):
            raise InputError(f"attention pattern {self.name!r} is unknown; expected one of {get_args(Attention)}")
        if self.name != "full":
            check_group_size(self.group_size)
        elif self.group_size is not None:
            raise InputError(f"group size {self.group_size} has no meaning for the pattern {self.name!r}; leave it out")


def check_group_size(group_size: int | None) -> None:
    """Raises InputError unless ``group_size`` is an even, positive number of tokens."""
    if not isinstance(group_size, int) or group_size <= 0 or group_size % 2:
        raise InputError(
            f"group size {group_size!r}: expected an even, positive number of tokens, since shifted groups are moved "
            "by half a group"
        )


def attends(
    pattern: AttentionPattern,
    head: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    num_heads: int,
    num_tokens: int | torch.Tensor,
    layer: int = 0,
) -> torch.Tensor:
    """Whether a query attends to a key: the definition of every pattern. All of them are causal.

    G is the pattern's group size, N the number of tokens; where heads are divided, the first ``num_heads // 2`` are one
    part and the others (5 of 9) the other.

    ``full``          every key up to the query.
    ``short``         keys of the query's own group, groups being [0, G), [G, 2G), ... (the paper's pattern 1).
    ``shifted``       the same with groups moved by half a group: [0, G/2), [G/2, 3G/2), ... (the paper's pattern 2), a
                      half group at each end. Nothing wraps around: the paper's own code joins the two ends, so that
                      its first half group sees the future; this is its appendix's variant without that leak.
    ``s2``            ``short`` in the first heads, ``shifted`` in the others (S²-Attn, section 3.2).
    ``s2-layers``     ``short`` in even layers, ``shifted`` in odd ones.
    ``dilated``       the G keys query, query - d, query - 2d, ...; d is 1 in the first heads, 2 in the others.
                      A reading: the paper has "dilation 1 to 2 evenly across heads" and no more.
    ``block-sparse``  the sequence is cut into n = ceil(N / G) blocks (4 in the paper, as here with G = N/4). Head h has
                      the block-wise mask number s = h mod n, in which query block i attends to key block (i + s) mod n;
                      blocks (i, j) above the diagonal are moved to the lower left, to (j, i). A query block that is
                      left with none attends to itself, and so does every query (documents might leave it no key). A
                      reading of the paper's one sentence on it and of the masks it refers to (Qiu et al., arXiv
                      1911.02972): moving by reflection and what follows it are ours.
    ``stride-sparse`` the last G keys (local) in the first heads; every floor(sqrt(N))-th key back from the query
                      (stride) in the others. The paper has "local size n/4, stride sqrt(n)", after Child et al.
                      (arXiv 1904.10509); dividing them over the heads, not the layers, is a reading.

    With groups (``short``, ``shifted``, ``s2``, ``s2-layers``), a sequence that is not longer than a group is one
    causal group for every head.

    Args:
        head, query, key: integer tensors (an index, positions in the sequence) that broadcast against each other.
        num_tokens: of the sequence, without padding; at least 1. A tensor that broadcasts if sequences differ.
        layer: the layer's index, from 0.

    Returns:
        A boolean tensor of the broadcast shape (of query and key alone where the heads do not differ).
    """
    causal = key <= query
    size = pattern.group_size
    second_part = head >= num_heads // 2
    match pattern.name:
        case "full":
            return causal
        case "short" | "shifted" | "s2" | "s2-layers":
            moved = {"short": 0, "shifted": 1, "s2": second_part, "s2-layers": layer % 2}[pattern.name]
            shift = moved * (num_tokens > size) * (size // 2)
            return causal & ((query + shift) // size == (key + shift) // size)
        case "dilated":
            dilation = 1 + second_part * 1
            distance = query - key
            return causal & (distance % dilation == 0) & (distance < size * dilation)
        case "block-sparse":
            num_blocks = (num_tokens + size - 1) // size
            mask_number = head % num_blocks
            i, j = query // size, key // size
            chosen = ((i + mask_number) % num_blocks == j) | ((j + mask_number) % num_blocks == i)
            left_with_none = (i < mask_number) & (i < num_blocks - mask_number)
            return causal & (chosen | (left_with_none & (i == j)) | (query == key))
        case "stride-sparse":
            distance = query - key
            local = ~second_part & (distance < size)
            return causal & (local | (second_part & (distance % _floor_sqrt(num_tokens) == 0)))


def _floor_sqrt(number: int | torch.Tensor) -> int | torch.Tensor:
    return math.isqrt(number) if isinstance(number, int) else number.double().sqrt().long()


def dense_mask(
    pattern: AttentionPattern,
    num_heads: int,
    num_tokens: int,
    device: torch.device | str | None = None,
    *,
    layer: int = 0,
    lengths: Sequence[int] | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The pattern written out. ``True`` at ``[..., head, query, key]``: the query attends to the key.

    Args:
        lengths: tokens of each sequence in a batch that is padded on the right. Each sequence has the pattern of its
            own length, so that padding changes nothing for its tokens.
        document_ids: (batch, num_tokens); a query attends only to keys of its own document.

    Returns:
        (num_heads, num_tokens, num_tokens), with the batch in front where ``lengths`` or ``document_ids`` are given.
    """
    position = torch.arange(num_tokens, device=device)
    head = torch.arange(num_heads, device=device)[:, None, None]
    shape = (num_heads, num_tokens, num_tokens)
    tokens: int | torch.Tensor = num_tokens
    if lengths is not None:
        tokens = torch.tensor(lengths, device=device).clamp(min=1)[:, None, None, None]
        shape = (len(lengths), *shape)
    mask = attends(
        pattern, head, position[:, None], position[None, :], num_heads=num_heads, num_tokens=tokens, layer=layer
    ).expand(shape)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return mask
