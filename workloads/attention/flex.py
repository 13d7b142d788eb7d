"""Every pattern through FlexAttention: the definition itself, compiled into a kernel that skips empty blocks.

Memory is one number for each block of 128 x 128, head and sequence. On a CPU FlexAttention has no backward pass and is
neither compiled nor fast: there only tests use it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from workloads.attention.masks import attends
from workloads.attention.options import Options
from workloads.attention.patterns import AttentionPattern


def flexible_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    options: Options,
) -> torch.Tensor:
    """Any pattern; tensors as in :func:`workloads.attention.backends.attention`, without dropout."""
    layer, lengths, document_ids, scale, _ = options
    if not pattern.definition.varies_by_layer:
        layer = 0  # one mask serves all layers
    what = (pattern, query.shape[1], query.shape[2], layer % 2, lengths, query.device)
    if document_ids is None:
        block_mask = _of_pattern(*what)
    else:
        known = _OF_DOCUMENTS.setdefault(document_ids, {})
        if what not in known:
            known[what] = _block_mask(*what, document_ids)
        block_mask = known[what]
    call = compiled(flex_attention) if query.is_cuda else flex_attention
    return call(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


_OF_DOCUMENTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@lru_cache(maxsize=16)
def _of_pattern(*what) -> BlockMask:
    return _block_mask(*what, None)


# What is kept for later calls must not be an inference tensor: those cannot be saved for a backward pass.
@torch.inference_mode(False)
def _block_mask(
    pattern: AttentionPattern,
    num_heads: int,
    num_tokens: int,
    layer: int,
    lengths: tuple[int, ...] | None,
    device: torch.device,
    document_ids: torch.Tensor | None,
) -> BlockMask:
    tokens_of = None if lengths is None else torch.tensor(lengths, device=device)

    def mask_mod(row, head, query, key):
        tokens = num_tokens if tokens_of is None else tokens_of[row]
        allowed = attends(pattern, head, query, key, num_heads=num_heads, num_tokens=tokens, layer=layer)
        if document_ids is not None:
            allowed = allowed & (document_ids[row, query] == document_ids[row, key])
        return allowed

    batch: int | None = None
    if lengths is not None:
        batch = len(lengths)
    elif document_ids is not None:
        batch = len(document_ids)
    # Compiled, which takes seconds, it never writes out a mask of (heads, tokens, tokens).
    small = (batch or 1) * num_heads * num_tokens**2 <= 2**28
    create = create_block_mask if small or device.type != "cuda" else compiled(create_block_mask)
    return create(mask_mod, batch, num_heads, num_tokens, num_tokens, device=device)


def compiled(function: Callable, **options) -> Callable:
    """Compiles ``function`` anew for each pattern and shape.

    A worker that trains several trials would reach torch's own limit of 8; past it, FlexAttention would silently fall
    back to a mask of (tokens, tokens) for every head. ``fullgraph`` makes that an error.
    """
    call = _compile(function, **options)

    def with_room(*args, **kwargs):
        with torch._dynamo.config.patch(recompile_limit=128):
            return call(*args, **kwargs)

    return with_room


@lru_cache
def _compile(function: Callable, **options) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True, **options)
