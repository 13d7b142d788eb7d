"""What an attention call has besides its tensors and its pattern, whichever backend computes it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Options(NamedTuple):
    """The optional arguments of :func:`workloads.attention.backends.attention`, which describes them."""

    layer: int = 0
    lengths: tuple[int, ...] | None = None
    document_ids: torch.Tensor | None = None
    scale: float | None = None
    dropout: float = 0.0
