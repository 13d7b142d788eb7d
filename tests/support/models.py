"""Small random models, and their loss as a textbook has it."""

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Settings with which all layers of a family use full attention.
ALL_FULL = {
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "mistral": {"sliding_window": None},
    "phi3": {"head_dim": None},
    "gemma2": {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None},
    "gemma3_text": {"layer_types": ["full_attention"] * 2},
}


def small_llama(**overrides) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, the same ones each time; ``overrides`` as of LlamaConfig."""
    torch.manual_seed(0)
    shape = dict(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides}))


def plain_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token but the first, from all logits: (batch, N, vocabulary) -> (batch, N - 1)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def small_config(family="llama", **overrides):
    """The configuration of a family's model with two layers that all attend fully."""
    sizes = {**SIZES, **ALL_FULL.get(family, {}), **overrides}
    config = AutoConfig.for_model(family, **{key: value for key, value in sizes.items() if value is not None})
    for field in [key for key, value in sizes.items() if value is None and hasattr(config, key)]:
        setattr(config, field, None)
    return config


def small_model(family="llama", **overrides):
    """A model of a family with two layers and random weights, the same ones each time."""
    torch.manual_seed(0)
    config = small_config(family, **overrides)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def random_tokens(batch=2, length=32):
    return torch.randint(8, 64, (batch, length), generator=torch.Generator().manual_seed(0))
