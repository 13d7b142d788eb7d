"""Which document each token of a packed sequence belongs to."""

from __future__ import annotations

import torch


def document_ids(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Numbers the documents of each sequence from 0, in order.

    Documents are separated by the end-of-sequence token, which belongs to the document it ends. A sequence may begin
    and end inside a document.

    Args:
        input_ids: (batch, tokens).

    Returns:
        (batch, tokens), int64; as ``document_ids`` of a model's forward call it stops attention at the boundaries.
    """
    ends = (input_ids == eos_token_id).long()
    return ends.cumsum(dim=-1) - ends
