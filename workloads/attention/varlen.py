"""Patterns made of groups through variable-length attention: FlashAttention-2 and -3, and torch's own FlashAttention-2.

Each group is one sequence of a single call: groups of any length, document boundaries and shorter sequences in a
batch cost nothing extra, and no mask exists. One call serves all heads with the same groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from workloads.attention.group_layout import group_boundaries, head_shifts, shared_heads
from workloads.attention.options import Options
from workloads.attention.patterns import AttentionPattern

# (query, key, value, boundaries, longest group, scale, dropout), each of (all tokens, heads, head_dim), to the output.
Kernel = Callable[..., torch.Tensor]


def flash_attention_2(query, key, value, boundaries, longest, scale, dropout) -> torch.Tensor:
    """The package ``flash-attn``."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, boundaries, boundaries, longest, longest, dropout, softmax_scale=scale, causal=True
    )


def flash_attention_3(query, key, value, boundaries, longest, scale, dropout) -> torch.Tensor:
    """The package ``flash-attn-3`` (Hopper). It has no dropout."""
    from flash_attn_interface import flash_attn_varlen_func

    output = flash_attn_varlen_func(
        query, key, value, boundaries, boundaries, longest, longest, softmax_scale=scale, causal=True
    )
    return output[0] if isinstance(output, tuple) else output  # its first releases return the log-sum-exp too


def torch_flash_attention(query, key, value, boundaries, longest, scale, dropout) -> torch.Tensor:
    """Torch's own FlashAttention-2.

    The operator itself: ``torch.nn.attention.varlen`` has no dropout, and its arguments change between torch releases.
    """
    output, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, longest, longest, dropout, True, False, scale=scale
    )
    return output


def varlen_attention(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    options: Options,
) -> torch.Tensor:
    """Any pattern that is made of groups; tensors as in :func:`workloads.attention.backends.attention`."""
    batch, heads, num_tokens, head_dim = query.shape
    layer, lengths, document_ids, scale, dropout = options
    group_size = min(pattern.group_size or num_tokens, num_tokens)
    scale = head_dim**-0.5 if scale is None else scale
    outputs = []
    for part, shift in head_shifts(heads, pattern.definition.first_shifted_head(heads, layer), group_size):
        boundaries = group_boundaries(batch, num_tokens, group_size, shift, lengths, document_ids, query.device)
        for q, kv in shared_heads(part, heads // key.shape[1]):
            laid_out = (x.transpose(1, 2).flatten(0, 1) for x in (query[:, q], key[:, kv], value[:, kv]))
            output = kernel(*laid_out, boundaries, group_size, scale, dropout)
            outputs.append(output.unflatten(0, (batch, num_tokens)))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)
