"""What longspan's speed is compared with: how its users would train without it, and the published S²-Attn.

    user's way     transformers and PEFT in a typical fine-tuning script: the model in bfloat16, default attention
                   (``sdpa``, full), gradient checkpointing on, no autocast; LoRA on q, k, v and o, embeddings and norms
                   switched to trainable; the loss from ``labels``; torch's AdamW with its defaults
    published S²   the same, with the attention of LongLoRA's own recipe (arXiv 2309.12307, algorithm 1): half of the
                   heads rolled by half a group, cut into groups, one FlashAttention-2 call, rolled back
    Liger          the user's way (full attention) with ``apply_liger_kernel_to_llama``
    Unsloth        full attention, as its documentation recommends (unsloth_baseline.py)

They train the same parameters as longspan, by other code; trainable embeddings and norms are bfloat16 here,
as in such a script, and float32 in longspan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import sdpa_mask

from workloads.config import Method

PUBLISHED = "published-s2"
GROUP_SIZE_FIELD = "published_s2_group_size"


def users_model(
    config: LlamaConfig, device: torch.device, method: Method = "lora+", group_size: int | None = None
) -> nn.Module:
    """A Llama of random bfloat16 weights as a user of transformers and PEFT sets it up for training.

    Args:
        method: ``lora+`` (rank 8, alpha 16, as longspan's default) or ``full``.
        group_size: of the published S²-Attn; None: the stock model's own full attention.
    """
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    model.config.use_cache = False
    if group_size is not None:
        setattr(model.config, GROUP_SIZE_FIELD, group_size)
        model.set_attn_implementation(PUBLISHED)
    model.gradient_checkpointing_enable()
    if method == "lora+":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "embed" in name or "norm" in name:
                parameter.requires_grad_()
    return model.train()


def users_step(model: nn.Module, context_length: int, autocast: bool = False) -> Callable[[], None]:
    """A function that takes one training step on one sequence of random tokens, without waiting for the device.

    Args:
        autocast: run forward passes under bfloat16 autocast, as transformers' Trainer does with ``bf16``.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0)
    device = parameters[0].device
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        tokens = torch.randint(model.config.vocab_size, (1, context_length), generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_liger_kernels() -> None:
    """Replaces transformers' Llama by Liger's, for the rest of this process.

    Raises:
        ImportError: liger-kernel is not installed.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()


def published_s2(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group_size: int, scale: float | None = None
) -> torch.Tensor:
    """S²-Attn as LongLoRA published it, re-implemented; not what longspan computes.

    The roll joins the sequence's two ends into one group, in which the first half group of tokens attends to the last
    (a leak from the future).

    Args:
        query: (batch, heads, tokens, head_dim).
        key, value: (batch, key_value_heads, tokens, head_dim), repeated for the heads that share them.
        group_size: even, a divisor of the tokens.

    Returns:
        (batch, tokens, heads, head_dim), contiguous.
    """
    batch, heads, num_tokens, head_dim = query.shape

    def cut(x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) -> (batch * groups, heads, G, head_dim)."""
        if x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        first, second = x.transpose(1, 2).chunk(2, dim=2)
        rolled = torch.cat((first, second.roll(-(group_size // 2), dims=1)), dim=2)
        return rolled.view(-1, group_size, heads, head_dim).transpose(1, 2)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = scaled_dot_product_attention(cut(query), cut(key), cut(value), is_causal=True, scale=scale)
    output = output.transpose(1, 2).reshape(batch, num_tokens, heads, head_dim)
    first, second = output.chunk(2, dim=2)
    return torch.cat((first, second.roll(group_size // 2, dims=1)), dim=2)


def _attention_forward(module, query, key, value, attention_mask, scaling=None, **kwargs) -> tuple[torch.Tensor, None]:
    """Transformers' calling convention."""
    return published_s2(query, key, value, getattr(module.config, GROUP_SIZE_FIELD), scaling), None


AttentionInterface.register(PUBLISHED, _attention_forward)
AttentionMaskInterface.register(PUBLISHED, sdpa_mask)  # makes none for whole sequences
