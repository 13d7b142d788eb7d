"""What computes a pattern: the backends, which of them can serve here, and the one function that calls them.

``sdpa``     PyTorch's own choice of kernel, on any device: groups without a mask, other patterns with one
``cudnn``    the same with cuDNN's kernels first
``flash4``   FlashAttention-4, the package flash-attn-4
``flash3``   FlashAttention-3, the package flash-attn-3
``flash2``   FlashAttention-2, the package flash-attn
``varlen``   torch's own FlashAttention-2, variable-length
``flex``     FlexAttention: any pattern, compiled

All compute the same function, that of :func:`workloads.attention.masks.attends`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import get_args

import torch
from torch.nn.functional import scaled_dot_product_attention

from workloads.attention.flex import flexible_attention
from workloads.attention.group_kernels import attention_in_groups
from workloads.attention.group_operator import flash4_writes_into_views
from workloads.attention.masks import dense_mask
from workloads.attention.options import Options
from workloads.attention.patterns import PATTERNS, AttentionPattern
from workloads.attention.varlen import flash_attention_2, flash_attention_3, torch_flash_attention, varlen_attention
from workloads.config import AttentionBackend
from workloads.errors import InputError

BACKENDS = tuple(name for name in get_args(AttentionBackend) if name != "auto")
VARLEN_KERNELS = {"flash2": flash_attention_2, "flash3": flash_attention_3, "varlen": torch_flash_attention}
# ``auto`` takes the first that can serve, FlashAttention-4 only on Hopper, where it was measured (docs/performance.md).
# FlashAttention-3 comes after the fast ones since it has not run yet.
PREFERRED: tuple[AttentionBackend, ...] = ("flash4", "cudnn", "flash2", "varlen", "flash3", "sdpa")
PREFERRED_WITH_DOCUMENTS: tuple[AttentionBackend, ...] = ("flash2", "varlen", "flash3", "flex", "sdpa")
PREFERRED_WITHOUT_GROUPS: tuple[AttentionBackend, ...] = ("flex", "sdpa")


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    *,
    layer: int = 0,
    lengths: Sequence[int] | None = None,
    document_ids: torch.Tensor | None = None,
    backend: AttentionBackend = "sdpa",
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention by a pattern: a pure function of its arguments, the same for every backend but for rounding.

    Args:
        query: (batch, heads, tokens, head_dim).
        key, value: (batch, key_value_heads, tokens, head_dim); ``heads`` is a multiple of ``key_value_heads``
            (grouped-query attention: query head h reads key/value head h // (heads // key_value_heads)).
        layer: the layer's index, from 0; ``s2-layers`` depends on it.
        lengths: tokens of each sequence where the batch is padded on the right. A sequence has the pattern of its own
            length: its tokens' outputs are what they are without padding. Outputs of padding have no meaning.
        document_ids: (batch, tokens) integers; attention stops where they change.
        backend: one that :func:`choose_backend` found able to serve, not ``auto``.
        scale: factor on the scores; 1 / sqrt(head_dim) where None.
        dropout: probability that a score is dropped.

    Returns:
        (batch, heads, tokens, head_dim).
    """
    at_least_one = None if lengths is None else tuple(max(1, length) for length in lengths)
    options = Options(layer, at_least_one, document_ids, scale, dropout)
    if backend == "flex":
        return flexible_attention(query, key, value, pattern, options)
    if backend in VARLEN_KERNELS:
        return varlen_attention(VARLEN_KERNELS[backend], query, key, value, pattern, options)
    if pattern.definition.is_grouped:
        return attention_in_groups(query, key, value, pattern, options, preferred=backend)
    return masked_attention(query, key, value, pattern, options)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    options: Options,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Any pattern by its dense mask, where there is no fast path. Memory grows with heads x tokens².

    Tensors as in :func:`attention`; ``allowed``, a boolean mask (batch, 1, tokens, tokens), is intersected.
    """
    num_heads, num_tokens = query.shape[1:3]
    layer, lengths, document_ids, scale, dropout = options
    mask = dense_mask(
        pattern, num_heads, num_tokens, query.device, layer=layer, lengths=lengths, document_ids=document_ids
    )
    if allowed is not None:
        # A padded query may be left with no key at all; softmax over nothing is NaN, so it attends to itself.
        mask = mask & allowed | torch.eye(num_tokens, dtype=torch.bool, device=query.device)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, dropout_p=dropout, enable_gqa=num_heads != key.shape[1]
    )


def choose_backend(
    requested: AttentionBackend,
    pattern: AttentionPattern,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int = 128,
    dropout: float = 0.0,
    documents: bool = False,
) -> AttentionBackend:
    """Returns the backend to use: the requested one, or with ``auto`` the fastest that can serve here.

    Args:
        dtype: of the computation (under autocast, autocast's).
        head_dim: of the model.
        dropout: of the attention scores in training.
        documents: whether attention is to stop at document boundaries.

    Raises:
        InputError: the requested backend is unknown, or cannot serve; it names what is missing.
    """
    facts = (pattern, device, dtype, head_dim, dropout)
    if requested == "auto":
        order = PREFERRED_WITH_DOCUMENTS if documents else PREFERRED
        order = order if pattern.definition.is_grouped else PREFERRED_WITHOUT_GROUPS
        return next(b for b in order if (b != "flash4" or _is_hopper(device)) and missing(b, *facts) is None)
    if requested not in BACKENDS:
        raise InputError(f"attention backend {requested!r} is unknown; expected one of auto, {', '.join(BACKENDS)}")
    reason = missing(requested, *facts)
    if reason:
        able = [backend for backend in BACKENDS if missing(backend, *facts) is None]
        raise InputError(f"attention backend {requested!r} needs {reason}; here auto or {', '.join(able)} would work")
    return requested


def missing(
    backend: AttentionBackend,
    pattern: AttentionPattern,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 128,
    dropout: float = 0.0,
) -> str | None:
    """Returns what a backend needs and lacks here, in words; None if it can serve."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"a CUDA device (this is {device.type})"
    if backend == "flex":
        if lacking := _lacking("triton", "triton"):
            return lacking
        if head_dim < 16:
            return f"a head dimension of at least 16 (this is {head_dim})"
        return f"a model without dropout in its attention (this has {dropout:g})" if dropout else None
    if not pattern.definition.is_grouped:
        grouped = ", ".join(name for name, known in PATTERNS.items() if known.is_grouped)
        return f"a pattern made of groups, one of {grouped} (this is {pattern.name})"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computation in bfloat16 or float16 (this is {str(dtype).removeprefix('torch.')})"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"a GPU of compute capability 8.0 or later (this is {major}.{minor})"
    if backend == "cudnn":
        return None if torch.backends.cudnn.is_available() else "cuDNN, which this torch is built without"
    if head_dim > 256 or head_dim % 8:
        return f"a head dimension up to 256 that is a multiple of 8 (this is {head_dim})"
    if backend == "varlen":
        present = torch.backends.cuda.is_flash_attention_available()
        return None if present else "FlashAttention, which this torch is built without"
    if backend == "flash2":
        return _lacking("flash-attn", "flash_attn.flash_attn_interface")  # flash-attn-4 has the folder flash_attn too
    if dropout:
        return f"a model without dropout in its attention (this has {dropout:g})"
    if backend == "flash4":
        if major not in (9, 10):
            return f"a Hopper or Blackwell GPU, compute capability 9.0 or 10.0 (this is {major}.{minor})"
        if head_dim > 128:  # what has run
            return f"a head dimension up to 128 (this is {head_dim})"
        if lacking := _lacking("flash-attn-4", "flash_attn.cute.interface"):
            return lacking
        return None if flash4_writes_into_views() else "another version of flash-attn-4 (4.0.0b36 is known to serve)"
    if major != 9:
        return f"a Hopper GPU, compute capability 9.0 (this is {major}.{minor})"
    return _lacking("flash-attn-3", "flash_attn_interface")


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _lacking(package: str, module: str) -> str | None:
    """Returns what is wrong with a package; None if its module can be imported."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return f"the package {package}, which is not installed"
        return f"the package {package}, which lacks {error.name} itself"
    except Exception as error:  # built for another torch, or with a dependency of another version
        return f"the package {package}, which cannot be imported ({error})"
    return None
