"""How a model takes a pattern: through transformers' attention interface, never by patching a class.

``use_pattern(model, pattern)`` selects the attention function ``longspan`` and writes the pattern into the model's
configuration; the function reads it there at each call. Its mask function is registered with it, since a registered
attention function without one gets no mask at all, not even for padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workloads.attention.patterns import AttentionPattern, dense_mask
from workloads.attention.shifted import shifted_sparse_attention
from workloads.errors import InputError
from workloads.models import refuse_sliding_windows

NAME = "longspan"
CONFIG_FIELD = "longspan_attention"


def use_pattern(model: PreTrainedModel, pattern: AttentionPattern) -> None:
    """Makes every attention layer of ``model`` follow ``pattern``.

    Raises:
        InputError: the model's code does not go through transformers' attention interface, or some of its layers
            attend in a window of their own, which the pattern would silently replace.
    """
    architecture = type(model).__name__
    if not model._supports_attention_backend:
        raise InputError(
            f"{architecture} does not take its attention through transformers' attention interface, so that an "
            "attention pattern cannot reach it; choose a model of the Llama, Mistral or Qwen families"
        )
    refuse_sliding_windows(model.config)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(f"{architecture} refused the attention function {NAME!r}; it cannot train with a pattern")
    _write(model, pattern)


@contextmanager
def full_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``model`` attends fully (evaluation); afterwards it has its pattern back."""
    before = getattr(model.config, CONFIG_FIELD)
    _write(model, AttentionPattern(name="full"))
    try:
        yield
    finally:
        setattr(model.config, CONFIG_FIELD, before)


def _write(model: PreTrainedModel, pattern: AttentionPattern) -> None:
    setattr(model.config, CONFIG_FIELD, asdict(pattern))


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' calling convention: (batch, heads, tokens, head_dim) in, (batch, tokens, heads, head_dim) out."""
    pattern = AttentionPattern(**getattr(module.config, CONFIG_FIELD))
    if pattern.name == "full":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries for {key.shape[2]} keys: the pattern {pattern.name!r} is for training on whole "
            "sequences; generate inside `with full_attention(model):`"
        )
    if attention_mask is None:
        output = shifted_sparse_attention(query, key, value, pattern.group_size, scale=scaling, dropout=dropout)
    else:
        allowed = dense_mask(pattern, query.shape[1], query.shape[2], query.device) & attention_mask
        # A padded query may be left with no key at all; softmax over nothing is NaN, so it attends to itself.
        allowed = allowed | torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, dropout_p=dropout, enable_gqa=True
        )
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, _attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
