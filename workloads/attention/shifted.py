"""Shifted sparse attention (S²-Attn), the fast path: groups become batches of ordinary causal attention.

Whole groups of equal length fold into the batch dimension, so that one call of PyTorch's scaled dot-product attention
serves them all; what is left over at the ends (a half group, a shorter last group) is a further small call. Where the
projections are laid out as transformers lays them out, (batch, tokens, heads, head_dim) in memory, the fold is a view.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from workloads.attention.patterns import check_group_size


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
    its appendix's variant without leakage. The definition is :func:`workloads.attention.patterns.dense_mask`.

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
    check_group_size(group_size)
    heads, key_value_heads = query.shape[1], key.shape[1]
    if key.shape != value.shape or query.shape[2] != key.shape[2] or heads % key_value_heads:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: expected as many tokens "
            "in each and a number of query heads that is a multiple of the key/value heads"
        )

    def attend(query, key, value):
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1]
        )

    if query.shape[2] <= group_size:
        return attend(query, key, value)
    half = heads // 2
    unshifted = _heads(query, key, value, slice(0, half))
    shifted = _heads(query, key, value, slice(half, heads))
    return torch.cat(
        [
            _attend_in_groups(attend, *unshifted, group_size, first=0),
            _attend_in_groups(attend, *shifted, group_size, first=group_size // 2),
        ],
        dim=1,
    )


def _heads(query, key, value, heads: slice):
    """These query heads with the key/value heads they read."""
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return query[:, heads], key[:, heads], value[:, heads]
    if heads.start % repeats == 0 and heads.stop % repeats == 0:
        shared = slice(heads.start // repeats, heads.stop // repeats)
        return query[:, heads], key[:, shared], value[:, shared]
    # The cut falls inside a key/value head's group of query heads (SmolLM2: 9 query heads over 3): one key/value head
    # for each query head.
    index = torch.arange(heads.start, heads.stop, device=query.device) // repeats
    return query[:, heads], key[:, index], value[:, index]


def _attend_in_groups(attend, query, key, value, group_size: int, first: int) -> torch.Tensor:
    """Attention inside the groups [0, first), [first, first + G), ...; the last one may be shorter."""
    num_tokens = query.shape[2]
    num_whole = (num_tokens - first) // group_size
    end = first + num_whole * group_size
    outputs = []
    if first:
        outputs.append(attend(query[:, :, :first], key[:, :, :first], value[:, :, :first]))
    if num_whole:
        folded = attend(*(_fold(x[:, :, first:end], num_whole) for x in (query, key, value)))
        outputs.append(_unfold(folded, num_whole))
    if end < num_tokens:
        outputs.append(attend(query[:, :, end:], key[:, :, end:], value[:, :, end:]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _fold(x_BHND: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(batch, heads, groups * G, head_dim) -> (batch * groups, heads, G, head_dim)."""
    return x_BHND.unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(0, 1)


def _unfold(x_BHND: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The inverse of :func:`_fold`."""
    return x_BHND.unflatten(0, (-1, num_groups)).transpose(1, 2).flatten(2, 3)
