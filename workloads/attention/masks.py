"""A pattern's definition on tensors: which queries attend to which keys, and the dense boolean mask of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workloads.attention.pattern import Pair
from workloads.attention.patterns import AttentionPattern


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
    """Whether a query attends to a key, by the pattern's definition.

    Arguments and result as of :class:`workloads.attention.pattern.Pair` and ``Pattern.attends``.
    """
    pair = Pair(head, query, key, num_heads, num_tokens, pattern.group_size or 0, layer)
    return pattern.definition.attends(pair)


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
    """Writes the pattern out. ``True`` at ``[..., head, query, key]``: the query attends to the key.

    Args:
        lengths: tokens of each sequence in a batch that is padded on the right. Each sequence has the pattern of its
            own length, so padding changes nothing for its tokens.
        document_ids: (batch, num_tokens); a query attends only to keys of its own document.

    Returns:
        (num_heads, num_tokens, num_tokens), with the batch in front where ``lengths`` or ``document_ids`` are given.
    """
    position = torch.arange(num_tokens, device=device)
    head = torch.arange(num_heads, device=device)[:, None, None]
    shape: tuple[int, ...] = (num_heads, num_tokens, num_tokens)
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
