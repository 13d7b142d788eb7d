"""What trains: LoRA, with or without norms and embeddings, or all parameters; in all layers or in some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from workloads.config import Method, trained_layers, trains_embeddings, trains_norms
from workloads.errors import InputError
from workloads.models.adapters import without_deprecations
from workloads.models.families import ATTENTION_PROJECTIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def adapt(
    model: nn.Module,
    method: Method,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_targets: Sequence[str] | None = None,
    train_layers: str = "all",
) -> nn.Module:
    """Marks what trains and returns the model to train: the model itself, or with LoRA a PEFT model around it.

    Trainable parameters become float32, whatever the dtype of the rest: 1,000 AdamW steps at 2e-5 leave a bfloat16 norm
    weight of 1.0 exactly unchanged.

    ``lora+`` is the paper's improved LoRA (section 3.3): embeddings and norms train, ``lm_head`` stays frozen;
    ``lora+norm`` and ``lora+embed`` train one of the two. Where a model ties its output layer to its embeddings, they
    stay tied and both train.

    Args:
        lora_targets: the linear modules of a layer that LoRA adapts; None: the attention projections.
        train_layers: where LoRA matrices, a layer's norms and ``full`` train (:func:`workloads.config.trained_layers`).
            The final norm and the embeddings train wherever the method trains norms or embeddings; ``full`` with a
            choice other than ``all`` trains nothing outside the chosen layers.

    Raises:
        InputError: the model has no such layers or modules, or a target is smaller than the LoRA rank.
    """
    model.requires_grad_(False)
    if method == "untuned":
        return model
    name, layers = decoder_layers(model)
    chosen = trained_layers(train_layers, len(layers))
    if method == "full":
        for module in [model] if train_layers == "all" else [layers[index] for index in chosen]:
            module.requires_grad_(True)
    else:
        targets = _lora_targets(model, lora_targets, lora_rank)
        only = {} if train_layers == "all" else {"layers_to_transform": list(chosen), "layers_pattern": name}
        model = _with_lora(model, targets, lora_rank, lora_alpha, only)
        if trains_norms(method):
            skipped = {m for index, layer in enumerate(layers) if index not in chosen for m in layer.modules()}
            for module in model.modules():
                if is_norm(module) and module not in skipped:
                    module.requires_grad_(True)
        if trains_embeddings(method):
            model.get_input_embeddings().requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def check_adaptation(
    config: PretrainedConfig,
    method: Method,
    *,
    lora_rank: int = 8,
    lora_targets: Sequence[str] | None = None,
    train_layers: str = "all",
) -> None:
    """Checks what :func:`adapt` checks, from a model's configuration, without loading or creating weights.

    Raises:
        InputError: as :func:`adapt`.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    trained_layers(train_layers, len(decoder_layers(model)[1]))
    if method.startswith("lora"):
        _lora_targets(model, lora_targets, lora_rank)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; a shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, torch's own or a model family's (LlamaRMSNorm)."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """A model's decoder layers, and the name of their list (``layers``, or ``h`` in some families).

    Raises:
        InputError: no list in it has as many modules as its configuration has layers.
    """
    num_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name.rpartition(".")[2], module
    raise InputError(
        f"{type(model).__name__} has no list of decoder layers, so longspan cannot tell what would train; "
        "choose a decoder-only language model of transformers"
    )


def _lora_targets(model: nn.Module, requested: Sequence[str] | None, rank: int) -> list[str]:
    """The modules of a layer that LoRA adapts, by the last part of their names, as present in the model."""
    sides: dict[str, int] = {}  # the smallest side of the linear modules of a name, whose shapes may differ
    for name, module in decoder_layers(model)[1].named_modules():
        if isinstance(module, nn.Linear):
            last = name.rpartition(".")[2]
            sides[last] = min(module.in_features, module.out_features, sides.get(last, module.in_features))
    linear = ", ".join(sorted(sides))
    if requested is None:
        targets = sorted(sides.keys() & set(ATTENTION_PROJECTIONS))
        if not targets:
            raise InputError(
                f"{type(model).__name__} has none of the attention projections that LoRA adapts "
                f"({', '.join(ATTENTION_PROJECTIONS)}); name lora_targets among its linear modules ({linear}), or "
                "train it with the method 'full'"
            )
    else:
        targets = sorted(set(requested))
        if unknown := [target for target in targets if target not in sides]:
            raise InputError(
                f"lora_targets has {', '.join(unknown)}, which the layers of {type(model).__name__} do not "
                f"have; their linear modules: {linear}"
            )
    for target in targets:
        if rank > sides[target]:
            raise InputError(
                f"lora_rank is {rank}, but {target} has a side of {sides[target]} and so no higher rank; choose a rank "
                f"up to {min(sides[each] for each in targets)}, or other lora_targets"
            )
    return targets


def _with_lora(model: nn.Module, targets: list[str], rank: int, alpha: float, only: dict) -> nn.Module:
    # Imported here, since full fine-tuning needs no PEFT, whose import takes about a second of each trial's start.
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none", **only)
    with without_deprecations():
        return get_peft_model(model, config)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts (all, trainable) parameters of a model."""
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def _size(parameter: nn.Parameter) -> int:
    # A 4-bit weight is stored two to a byte; its quantisation state has the shape.
    quantised = getattr(parameter, "quant_state", None)
    return quantised.shape.numel() if quantised else parameter.numel()


def keep_autocast_dtype(model: nn.Module) -> None:
    """Keeps activations in autocast's dtype, also after float32 embeddings and norms; without autocast, no change.

    A float32 embedding would make every residual of the model float32; the output of a float32 norm would be cast again
    by each linear layer that reads it. Their own arithmetic and gradients stay in float32.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) or is_norm(module):
            module.register_forward_hook(_in_autocast_dtype)
        elif hasattr(module, "lora_A"):
            # PEFT would cast to float32 what autocast casts back.
            module.cast_input_dtype_enabled = False


def _in_autocast_dtype(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of frozen weights and of autocast at a precision."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
