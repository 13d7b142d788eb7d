"""``block-sparse``: the sequence is cut into n = ceil(N / G) blocks, and each head pairs blocks by another mask.

The paper has 4 blocks, as here with G = N/4. Head h has the block-wise mask number s = h mod n, in which query block i
attends to key block (i + s) mod n; blocks (i, j) above the diagonal are moved to the lower left, to (j, i). A query
block that is left with none attends to itself, and so does every query (documents might leave it no key).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workloads.attention.pattern import Pair, Pattern, causal_pairs

if TYPE_CHECKING:
    import torch


def _attends(pair: Pair) -> torch.Tensor:
    size = pair.group_size
    num_blocks = (pair.num_tokens + size - 1) // size
    mask_number = pair.head % num_blocks
    i, j = pair.query // size, pair.key // size
    chosen = ((i + mask_number) % num_blocks == j) | ((j + mask_number) % num_blocks == i)
    left_with_none = (i < mask_number) & (i < num_blocks - mask_number)
    return pair.is_causal & (chosen | (left_with_none & (i == j)) | (pair.query == pair.key))


def _attended_pairs(tokens: int, group_size: int, num_heads: int, layer: int) -> int:
    return sum(_pairs_of_head(tokens, group_size, head) for head in range(num_heads))


def _pairs_of_head(tokens: int, size: int, head: int) -> int:
    num_blocks = -(-tokens // size)
    mask_number = head % num_blocks
    pairs = 0
    for i in range(num_blocks):
        rows = min(size, tokens - i * size)
        keys = {(i + mask_number) % num_blocks, (i - mask_number) % num_blocks}
        before = sum(j < i for j in keys)  # whole blocks of keys: only the last may be shorter, and none follows it
        diagonal = i in keys or (mask_number > i and i + mask_number < num_blocks)
        pairs += before * rows * size + (causal_pairs(rows) if diagonal else rows)
    return pairs


BLOCK_SPARSE = Pattern(
    name="block-sparse",
    label="block-sparse",
    source="LongLoRA section 4.3: one sentence, and the masks it refers to (Qiu et al., arXiv 1911.02972); moving "
    "blocks by reflection and what follows from it are our reading",
    attends=_attends,
    attended_pairs=_attended_pairs,
)
