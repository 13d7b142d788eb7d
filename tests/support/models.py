"""Small random models, and their loss as a textbook has it."""

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(**overrides) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, the same ones each time; ``overrides`` as of LlamaConfig."""
    torch.manual_seed(0)
    shape = dict(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides}))


def plain_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token but the first, from all logits: (batch, N, vocabulary) -> (batch, N - 1)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
