"""What trains: LoRA, LoRA+ (LoRA with trainable embeddings and norms) or everything."""

from __future__ import annotations

import torch
from torch import nn

from workloads.config import Method
from workloads.errors import InputError

# The projections of the attention layers, by the names that model families give them (the paper adapts q, k, v, o;
# GPT-NeoX joins the first three).
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "query_key_value", "dense", "qkv_proj")


def adapt(model: nn.Module, method: Method, *, lora_rank: int = 8, lora_alpha: float = 16.0) -> nn.Module:
    """Marks what trains and returns the model to train: itself, or with LoRA a PEFT model around it.

    Trainable parameters are float32 afterwards, whatever the rest of the model is: 1,000 AdamW steps at 2e-5 leave a
    bfloat16 norm weight of 1.0 exactly where it was.

    ``lora+`` is the paper's improved LoRA (section 3.3): embeddings and norms train, ``lm_head`` stays frozen. Where a
    model ties its output to its embeddings, the two stay tied and both move.
    """
    model.requires_grad_(False)
    if method == "full":
        model.requires_grad_(True)
    elif method in ("lora", "lora+"):
        model = _with_lora(model, lora_rank, lora_alpha)
        if method == "lora+":
            for module in model.modules():
                if is_norm(module):
                    module.requires_grad_(True)
            model.get_input_embeddings().requires_grad_(True)
    elif method != "untuned":
        raise InputError(f"method {method!r} is unknown; expected lora, lora+, full or untuned")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, torch's own or a model family's (LlamaRMSNorm)."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")


def _with_lora(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    # Imported here: full fine-tuning does without PEFT, whose import takes about a second of each trial's start.
    from peft import LoraConfig, get_peft_model

    present = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(present.intersection(ATTENTION_PROJECTIONS))
    if not targets:
        raise InputError(
            f"{type(model).__name__} has none of the attention projections that LoRA adapts "
            f"({', '.join(ATTENTION_PROJECTIONS)}); train it with the method 'full'"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    return get_peft_model(model, config)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters of a model."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def compute_dtype(precision: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
