"""Gives a model a pattern through transformers' attention interface, without patching a class.

``use_pattern(model, pattern)`` selects the attention function ``longspan`` and writes the pattern into the model's
configuration; the function reads it there at each call. Its mask function is registered with it, since a registered
attention function without one gets no mask at all, not even for padding.

A model's forward call takes ``document_ids=`` (documents.py): models of transformers pass such arguments to their
attention function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from workloads.attention.backends import attention, choose_backend, masked_attention
from workloads.attention.group_kernels import cudnn_first
from workloads.attention.options import Options
from workloads.attention.patterns import AttentionPattern
from workloads.config import AttentionBackend
from workloads.errors import InputError
from workloads.models.families import refuse_unsupported

NAME = "longspan"
CONFIG_FIELD = "longspan_attention"
# An attention layer's index modulo 2, the only part of it that patterns read: torch.compile makes one graph for each
# index that is read, and stops at the eighth.
LAYER_FIELD = "longspan_layer"


def use_pattern(
    model: PreTrainedModel,
    pattern: AttentionPattern,
    backend: AttentionBackend = "auto",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    documents: bool = False,
) -> None:
    """Makes every attention layer of ``model`` follow ``pattern``.

    Args:
        backend: what computes it; ``auto`` takes the fastest that can serve. :func:`backend_of` returns which.
        device, dtype: of the model's computation; by default the model's own.
        documents: whether its calls will have ``document_ids``.

    Raises:
        InputError: the model's family is not supported, some of its layers attend in a way that the pattern would
            silently replace, or the backend cannot serve.
    """
    config = model.config
    refuse_unsupported(config)
    chosen = choose_backend(
        backend,
        pattern,
        device or model.device,
        dtype or model.dtype,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dropout=getattr(config, "attention_dropout", 0.0),
        documents=documents,
    )
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise InputError(
            f"{type(model).__name__} refused the attention function {NAME!r}; it cannot train with a pattern"
        )
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            setattr(module, LAYER_FIELD, module.layer_idx % 2)
    _write(model, pattern, chosen)


@contextmanager
def full_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context in which ``model`` attends fully, as in evaluation; its pattern returns afterwards."""
    before = getattr(model.config, CONFIG_FIELD)
    # FlexAttention is for masks that other kernels do not know; plain causal attention they compute faster.
    backend: AttentionBackend = "sdpa" if before["backend"] == "flex" else before["backend"]
    _write(model, AttentionPattern(name="full"), backend)
    try:
        yield
    finally:
        setattr(model.config, CONFIG_FIELD, before)


def backend_of(model: PreTrainedModel) -> AttentionBackend:
    """Returns the backend that computes the model's pattern."""
    return getattr(model.config, CONFIG_FIELD)["backend"]


def _write(model: PreTrainedModel, pattern: AttentionPattern, backend: AttentionBackend) -> None:
    setattr(model.config, CONFIG_FIELD, {**asdict(pattern), "backend": backend})


@dataclass(frozen=True, slots=True)
class RightPadding:
    """Replaces the mask of a batch that is padded on the right: the number of tokens of each sequence."""

    lengths: tuple[int, ...]


def _mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> torch.Tensor | RightPadding | None:
    """A mask function in transformers' calling convention; it runs once for all layers of a forward call.

    Attention is causal, so no token sees padding on its right: that needs no mask.
    """
    plain = allow_is_causal_skip and mask_function is causal_mask_function
    if plain and attention_mask is not None and q_length == kv_length == attention_mask.shape[-1]:
        lengths = attention_mask.sum(dim=-1)
        positions = torch.arange(kv_length, device=lengths.device)
        if torch.equal(attention_mask, positions < lengths[:, None]):
            padding = RightPadding(tuple(lengths.tolist()))
            return padding if min(padding.lengths) < kv_length else None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | RightPadding | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Transformers' calling convention: (batch, heads, tokens, head_dim) in, (batch, tokens, heads, head_dim) out."""
    settings = getattr(module.config, CONFIG_FIELD)
    pattern = AttentionPattern(name=settings["name"], group_size=settings["group_size"])
    backend = settings["backend"]
    padding = attention_mask if isinstance(attention_mask, RightPadding) else None
    mask = None if padding else attention_mask
    if torch.is_autocast_enabled(query.device.type):
        # RoPE may have made query and key float32; kernels that autocast does not know take them as they come.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    generating = mask is not None or query.shape[2] != key.shape[2]
    if pattern.name == "full" and document_ids is None and generating:
        # As in the stock model: with a cache, or with padding on the left.
        with cudnn_first() if backend == "cudnn" else contextlib.nullcontext():
            return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries for {key.shape[2]} keys: the pattern {pattern.name!r} is for training on whole "
            "sequences; generate inside `with full_attention(model):`"
        )
    options: dict[str, Any] = {
        "layer": getattr(module, LAYER_FIELD) if pattern.definition.varies_by_layer else 0,
        "document_ids": document_ids,
        "scale": scaling,
        "dropout": dropout,
    }
    if mask is None:
        lengths = padding.lengths if padding else None
        output = attention(query, key, value, pattern, lengths=lengths, backend=backend, **options)
    else:
        output = masked_attention(query, key, value, pattern, Options(**options), allowed=mask)
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, _attention_forward)
AttentionMaskInterface.register(NAME, _mask)
