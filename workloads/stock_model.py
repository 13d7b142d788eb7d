"""A trained model for stock transformers and stock PEFT: merged or as an adapter, without longspan's settings."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workloads.adaptation.methods import compute_dtype
from workloads.attention.interface import CONFIG_FIELD
from workloads.config import Precision
from workloads.models.positions import max_context_length

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: Precision = "bfloat16"
) -> None:
    """Writes a model (see :func:`merge`) with its tokenizer for ``AutoModelForCausalLM.from_pretrained(out)``.

    The model is made stock (see :func:`make_stock`) and its parameters are rounded to ``dtype``.
    """
    make_stock(model)
    cast_parameters(model, compute_dtype(dtype))
    model.save_pretrained(out)
    _add_older_forms(out / "config.json")
    _save_tokenizer(tokenizer, model, out)


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    dtype: Precision = "bfloat16",
    base_revision: str | None = None,
) -> None:
    """Writes everything that trains in ``model`` for ``PeftModel.from_pretrained(base, out)``.

    The configuration to load the base with is written beside it. LoRA's matrices are saved as PEFT does. Modules that
    train as a whole (LoRA+'s embeddings and norms) become ``modules_to_save``, by their full names: PEFT matches by
    suffix, and ``norm`` would match every layer norm. If the output layer is tied to the embeddings,
    ``ensure_weight_tying`` makes PEFT tie them again, and it expects both names in the file.

    The model is made stock (see :func:`make_stock`), and what trains is rounded to ``dtype``.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    make_stock(model)
    cast_parameters(model, compute_dtype(dtype), only_trainable=True)
    # Without this flag PEFT asks the model hub whether the vocabulary has grown.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and "lora_" not in name
    }
    config = copy.deepcopy(model.peft_config["default"])
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.revision = base_revision
    if whole:
        prefix = "base_model.model."
        config.modules_to_save = sorted({name.removeprefix(prefix).rpartition(".")[0] for name in whole})
        config.ensure_weight_tying = _is_tied(model)
    config.save_pretrained(str(out))
    # Copies, since safetensors refuses two names for the same memory.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in (tensors | whole).items()}
    save_file(copies, out / "adapter_model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)
    _add_older_forms(out / "config.json")
    _save_tokenizer(tokenizer, model, out)


def merge(model: nn.Module) -> PreTrainedModel:
    """The model without PEFT around it, LoRA's updates added to its weights in their dtype; any other model as it is.

    PEFT's ``merge_and_unload`` would round the sum to a quantised layer's codes again, although :func:`make_stock` has
    dequantised it.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from workloads.adaptation.lora_fusion import unfuse_lora

    if not isinstance(model, PeftModel):
        return model
    unfuse_lora(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            weight.data += module.get_delta_weight("default").to(weight.dtype)
    return model.unload()


def make_stock(model: nn.Module) -> Any | None:
    """Removes longspan's own settings from ``model`` in place, for stock transformers.

    Attention becomes transformers' own, the key/value cache is on, a quantised base is dequantised, and the generation
    settings are ones that transformers can save. RoPE stays as trained. Returns the quantisation that was undone.
    """
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    quantization = None
    if getattr(base, "hf_quantizer", None) is not None:
        quantization = base.config.quantization_config
        trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
        base.dequantize()
        for name, parameter in base.named_parameters():  # dequantising made new parameters
            parameter.requires_grad_(name in trainable)
    for setting in ("quantization_config", CONFIG_FIELD):
        vars(base.config).pop(setting, None)
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")  # transformers' Gemma 2 has only eager
    base.config.use_cache = True
    generation = base.generation_config
    generation.use_cache = True
    generation.max_length = None  # made for the original context length
    try:
        generation.validate(strict=True)
    except ValueError:
        # A temperature with greedy decoding, as Llama 2 was published: transformers refuses to save that.
        generation.do_sample = True
    return quantization


def cast_parameters(model: nn.Module, dtype: torch.dtype, only_trainable: bool = False) -> None:
    """Casts parameters in place. Buffers stay, since RoPE's frequencies must not be rounded; so do ties."""
    for parameter in model.parameters():
        if parameter.requires_grad or not only_trainable:
            parameter.data = parameter.data.to(dtype)


def _is_tied(model: nn.Module) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module, out: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_context_length(model.config)
    tokenizer.save_pretrained(out)
    _make_tokenizer_portable(out / "tokenizer_config.json")
    for weights in out.glob("*.safetensors"):  # safetensors ignores the umask and gives access only to the owner
        weights.chmod((out / "config.json").stat().st_mode)


def _add_older_forms(file: Path) -> None:
    """Adds to a config.json how transformers 4 reads positions and dtype, which ignores ``rope_parameters``.

    Transformers 5 reads both forms. llama.cpp's converter reads ``rope_parameters``, and of GPT-NeoX the older names.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    if rope := values.get("rope_parameters"):
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = scaling if rope["rope_type"] != "default" else None
        if (rotated := rope.get("partial_rotary_factor")) is not None:
            values["partial_rotary_factor"] = rotated
        if values["model_type"] == "gpt_neox":
            values |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rotated}
    if "dtype" in values:
        values["torch_dtype"] = values["dtype"]
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _make_tokenizer_portable(file: Path) -> None:
    """Names a tokenizer's class and special tokens as transformers 4 knows them too."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "backend"):  # of this load; transformers 5 finds the last by itself
        values.pop(name, None)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
