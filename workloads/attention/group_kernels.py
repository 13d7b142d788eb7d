"""Patterns made of groups by PyTorch's own kernels: groups become batches of causal attention.

Whole groups of equal length fold into the batch dimension, so that one call serves them all; what is left over at the
ends (a half group, a shorter last group) is a further small call. Where the projections are laid out as transformers
lays them out, (batch, tokens, heads, head_dim) in memory, the fold is a view.

The operator of :mod:`workloads.attention.group_operator` computes this without copies wherever it has a kernel. The
rest goes through scaled dot-product attention and autograd: document boundaries (a mask), dropout, float32 on a
GPU, a GPU older than compute capability 8.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from workloads.attention.group_layout import head_shifts, shared_heads
from workloads.attention.group_operator import grouped_attention, kernel_for
from workloads.attention.options import Options
from workloads.attention.patterns import AttentionPattern


def shifted_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group_size: int,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention inside groups; the second half of the query heads has its groups shifted by half a group.

    Query heads before index ``heads // 2`` attend inside groups [0, G), [G, 2G), ...; the others (5 of 9 where the
    count is odd) inside [0, G/2), [G/2, 3G/2), ..., so that information flows between neighbouring groups from layer to
    layer. No group wraps around: no query sees a later key. LongLoRA (arXiv 2309.12307) section 3.2; the grouping is
    its appendix's variant without leakage. The definition is in workloads/attention/patterns/shifted_sparse.py.

    Args:
        query: (batch, heads, tokens, head_dim).
        key, value: (batch, key_value_heads, tokens, head_dim); ``heads`` is a multiple of ``key_value_heads``
            (grouped-query attention: query head h reads key/value head h // (heads // key_value_heads)).
        group_size: tokens in a group, even. Tokens need not be a multiple of it: the last group is then shorter. A
            sequence that is not longer than a group is one causal group for every head.
        scale: factor on the scores; 1 / sqrt(head_dim) where None.
        dropout: probability that a score is dropped.

    Returns:
        (batch, heads, tokens, head_dim).

    Raises:
        InputError: the group size is not even and positive.
        ValueError: shapes that do not belong together.
    """
    pattern = AttentionPattern(name="s2", group_size=group_size)
    return attention_in_groups(query, key, value, pattern, Options(scale=scale, dropout=dropout))


def attention_in_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    options: Options,
    preferred: str = "flash",
) -> torch.Tensor:
    """Any pattern that is made of groups; tensors as in :func:`workloads.attention.backends.attention`.

    Document boundaries need a mask of (group, group) for each group, shared by all heads; nothing else needs one. With
    ``preferred`` the kernels of ``cudnn`` or ``flash4`` are taken where they can be, otherwise torch's own.
    """
    heads, key_value_heads = query.shape[1], key.shape[1]
    if key.shape != value.shape or query.shape[2] != key.shape[2] or heads % key_value_heads:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: expected as many tokens "
            "in each and a number of query heads that is a multiple of the key/value heads"
        )
    num_tokens, head_dim = query.shape[2:]
    layer, lengths, document_ids, scale, dropout = options
    group_size = pattern.group_size or num_tokens
    ids = None if document_ids is None else document_ids[:, None, :, None]
    lengths = lengths or ()
    compute: Callable[..., torch.Tensor]
    kernel = None
    if ids is None and not dropout:
        kernel = kernel_for(preferred, query.device, query.dtype, head_dim)
    if kernel is not None:
        compute = partial(_by_operator, group_size, head_dim**-0.5 if scale is None else scale, kernel)
    else:
        attend = partial(_attend, scale=scale, dropout=dropout, prefer_cudnn=preferred == "cudnn")
        compute = partial(_by_autograd, group_size, attend)

    first_shifted = heads if num_tokens <= group_size else pattern.definition.first_shifted_head(heads, layer)
    num_short = sum(length <= group_size for length in lengths)
    if first_shifted == heads or num_short == 0:
        return compute(query, key, value, ids, first_shifted)
    if num_short == len(lengths):
        return compute(query, key, value, ids, heads)
    # Sequences that are not longer than a group are one group for every head: they are computed separately.
    order = sorted(range(len(lengths)), key=lambda row: lengths[row] > group_size)
    parts = []
    for rows, first in ((order[:num_short], heads), (order[num_short:], first_shifted)):
        parts.append(compute(query[rows], key[rows], value[rows], None if ids is None else ids[rows], first))
    return torch.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]


def _by_operator(group_size, scale, kernel, query, key, value, ids, first_shifted: int) -> torch.Tensor:
    output, _ = grouped_attention(query, key, value, group_size, first_shifted, scale, kernel)
    return output


def _by_autograd(group_size, attend, query, key, value, ids, first_shifted: int) -> torch.Tensor:
    repeats = query.shape[1] // key.shape[1]
    outputs = [
        _attend_in_groups(attend, (query[:, q], key[:, kv], value[:, kv], ids), group_size, first=shift)
        for heads, shift in head_shifts(query.shape[1], first_shifted, group_size)
        for q, kv in shared_heads(heads, repeats)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def cudnn_first():
    """A context that prefers cuDNN's kernels, which refuse groups of a single token."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _attend(query, key, value, ids, *, scale, dropout, prefer_cudnn):
    """Causal attention; inside documents where ``ids`` (batch, 1, tokens, 1) are given."""
    mask = None if ids is None else (ids == ids.transpose(-1, -2)).tril()
    with cudnn_first() if prefer_cudnn else contextlib.nullcontext():
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _attend_in_groups(attend, tensors, group_size: int, first: int) -> torch.Tensor:
    """Attention inside the groups [0, first), [first, first + G), ...; the last one may be shorter."""
    num_tokens = tensors[0].shape[2]
    num_whole = (num_tokens - first) // group_size
    end = first + num_whole * group_size

    def part(start, stop, change=lambda x: x):
        return (None if x is None else change(x[:, :, start:stop]) for x in tensors)

    outputs = []
    if first:
        outputs.append(attend(*part(0, first)))
    if num_whole:
        outputs.append(_unfold(attend(*part(first, end, lambda x: _fold(x, num_whole))), num_whole))
    if end < num_tokens:
        outputs.append(attend(*part(end, num_tokens)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _fold(x_BHND: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(batch, heads, groups * G, head_dim) -> (batch * groups, heads, G, head_dim)."""
    return x_BHND.unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(0, 1)


def _unfold(x_BHND: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The inverse of :func:`_fold`."""
    return x_BHND.unflatten(0, (-1, num_groups)).transpose(1, 2).flatten(2, 3)
