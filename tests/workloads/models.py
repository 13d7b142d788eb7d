"""Small random models."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(**overrides) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, the same ones each time; ``overrides`` as of LlamaConfig."""
    torch.manual_seed(0)
    shape = dict(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides}))
