"""Attention patterns for long-context training: their definition, the fast paths, and how models use them.

This file imports nothing, so ``patterns`` can be read without torch; import from the modules.

``pattern``    what a pattern is: its predicate, the pairs it attends, its groups, its label and source
``patterns``   the registry of patterns, one file a pattern or kind of pattern; a pattern with its settings
``options``    the optional arguments of an attention call
``masks``      a pattern's definition on tensors, and its dense boolean mask: slow and obvious
``backends``   what computes a pattern, which backends can serve, and the one function that calls them
``group_kernels``   groups as batches of ordinary causal attention (S²-Attn and its kin by PyTorch's own kernels)
``group_operator``  the same as one operator of torch that copies nothing twice, forward and backward
``varlen``     groups as sequences of variable-length attention (FlashAttention)
``flex``       any pattern by FlexAttention
``group_layout``    what ``group_kernels``, ``group_operator`` and ``varlen`` share
``documents``  which document each token belongs to
``interface``  transformers' attention interface: a model is given a pattern by name, no class is patched

workloads/models/families.py has the model families that take a pattern, and why others do not.
"""
