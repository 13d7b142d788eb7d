"""A base whose linear weights are kept in 4 bits (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from workloads.errors import InputError


def nf4_loading(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the options of ``from_pretrained`` that load a base in NF4 with double quantisation onto its GPU.

    Every linear layer but the output layer is quantised, and computes in ``dtype``; the rest keeps its own type.

    Raises:
        InputError: the device is no GPU, or bitsandbytes is not installed.
    """
    if device.type != "cuda":
        raise InputError(
            f"quantization nf4 needs a CUDA GPU, but this trial runs on {device.type}; run it where there is one, or "
            "with quantization none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "quantization nf4 needs bitsandbytes, which is not installed; install it with pip install 'longspan[gpu]'"
        )
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": quantization, "device_map": {"": device}}
