"""Attention patterns for long-context training: their definition, the fast path, and the way models reach them.

``patterns``   what each pattern is: a dense boolean mask, slow and obvious, the one definition of it
``shifted``    shifted sparse attention (S²-Attn), fast: groups as batches of ordinary causal attention
``interface``  transformers' attention interface: a model is given a pattern by name, no class is patched
"""

from workloads.attention.interface import full_attention, use_pattern
from workloads.attention.patterns import AttentionPattern, dense_mask
from workloads.attention.shifted import shifted_sparse_attention

__all__ = ["AttentionPattern", "dense_mask", "full_attention", "shifted_sparse_attention", "use_pattern"]
