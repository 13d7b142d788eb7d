"""Patterns that are made of groups of consecutive tokens, as the fast backends take them.

In a grouped pattern (workloads/attention/patterns/shifted_sparse.py) every head attends causally inside groups of
consecutive tokens: kernels for causal attention serve it without any mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary


def head_shifts(num_heads: int, first_shifted: int, group_size: int) -> list[tuple[slice, int]]:
    """Which heads have their groups shifted by how many tokens: (heads, shift), in the order of the heads."""
    parts = [(slice(0, first_shifted), 0), (slice(first_shifted, num_heads), group_size // 2)]
    return [(heads, shift) for heads, shift in parts if heads.start < heads.stop]


def shared_heads(heads: slice, repeats: int) -> Iterator[tuple[slice, slice]]:
    """Cuts query heads into runs that read whole key/value heads: (query heads, their key/value heads).

    ``repeats`` query heads read one key/value head. Where ``heads`` begins or ends inside those of a key/value head
    (SmolLM2: 9 over 3, of which the first 4 are unshifted), that part is a run of its own, so that no key or value is
    ever copied.
    """
    start = heads.start
    while start < heads.stop:
        first_whole, end_of_whole = -(-start // repeats) * repeats, heads.stop // repeats * repeats
        if start < first_whole:
            stop = min(first_whole, heads.stop)
        else:
            stop = end_of_whole if start < end_of_whole else heads.stop
        yield slice(start, stop), slice(start // repeats, -(-stop // repeats))
        start = stop


def group_boundaries(
    batch: int,
    num_tokens: int,
    group_size: int,
    shift: int,
    lengths: tuple[int, ...] | None,
    document_ids: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Returns where groups begin in the batch's concatenated tokens, and where the last one ends: (groups + 1), int32.

    A document's end is a boundary too. Variable-length attention calls this ``cu_seqlens``.
    """
    if document_ids is None:
        return _of_groups(batch, num_tokens, group_size, shift, lengths, device)
    # Every layer asks for the same; only the first waits for the device to count the boundaries.
    known = _OF_DOCUMENTS.setdefault(document_ids, {})
    key = (group_size, shift, lengths)
    if key not in known:
        known[key] = _boundaries(batch, num_tokens, group_size, shift, lengths, document_ids)
    return known[key]


_OF_DOCUMENTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@lru_cache(maxsize=64)
def _of_groups(batch, num_tokens, group_size, shift, lengths, device) -> torch.Tensor:
    return _boundaries(batch, num_tokens, group_size, shift, lengths, None).to(device)


# What is kept for later calls must not be an inference tensor: those cannot be saved for a backward pass.
@torch.inference_mode(False)
def _boundaries(batch, num_tokens, group_size, shift, lengths, document_ids) -> torch.Tensor:
    begins = torch.zeros(batch, num_tokens, dtype=torch.bool)
    for row in range(batch):
        length = num_tokens if lengths is None else lengths[row]
        begins[row, shift if length > group_size else 0 :: group_size] = True
    begins[:, 0] = True
    if document_ids is not None:
        begins = begins.to(document_ids.device)
        begins[:, 1:] |= document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([batch * num_tokens])]).int()
