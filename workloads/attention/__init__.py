"""Attention patterns for long-context training: their definition, the fast paths, and the way models reach them.

``patterns``   what each pattern is: a predicate and its dense boolean mask, slow and obvious, the one definition of it
``backends``   what computes a pattern, which backends can serve, and the one function that calls them
``shifted``    groups as batches of ordinary causal attention (S²-Attn and its kin by PyTorch's own kernels)
``grouped``    the same as one operator of torch that copies nothing twice, forward and backward
``varlen``     groups as sequences of variable-length attention (FlashAttention)
``flex``       any pattern by FlexAttention
``groups``     what ``shifted``, ``grouped`` and ``varlen`` share
``documents``  which document each token belongs to
``interface``  transformers' attention interface: a model is given a pattern by name, no class is patched
``families``   the model families that take a pattern, and why others do not
"""

from workloads.attention.backends import attention, choose_backend
from workloads.attention.documents import document_ids
from workloads.attention.interface import backend_of, full_attention, use_pattern
from workloads.attention.patterns import AttentionPattern, dense_mask
from workloads.attention.shifted import shifted_sparse_attention

__all__ = [
    "AttentionPattern",
    "attention",
    "backend_of",
    "choose_backend",
    "dense_mask",
    "document_ids",
    "full_attention",
    "shifted_sparse_attention",
    "use_pattern",
]
