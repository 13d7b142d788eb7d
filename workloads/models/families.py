"""The model families that take an attention pattern, and why others do not."""

from __future__ import annotations

from typing import Any

from workloads.errors import InputError
from workloads.models.source import refuse_sliding_windows

# By model_type. Each has a test that the whole model under a pattern equals the stock model given the dense mask.
SUPPORTED = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gpt_neox": "GPT-NeoX",
    "phi3": "Phi-3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
}


def refuse_unsupported(config: Any) -> None:
    """Raises InputError, with the reason, if a model of this configuration cannot take an attention pattern."""
    kind = config.model_type
    if kind not in SUPPORTED:
        # Gemma 3's layers differ in their rotary positions, which positions.py refuses when it is loaded.
        usable = [name for family, name in SUPPORTED.items() if family != "gemma3_text"]
        raise InputError(
            f"a {kind} model is of no family that longspan's attention patterns are known to reach; choose a model of "
            f"the families {', '.join(usable)}"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap:
        raise InputError(
            f"a {kind} model caps its attention scores (attn_logit_softcapping is {softcap:g}), which the fast "
            "attention kernels do not compute; choose a model without soft-capping"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise InputError(
            f"a {kind} model that attends in both directions (use_bidirectional_attention): longspan's attention "
            "patterns are causal; choose a causal model"
        )
    refuse_sliding_windows(config)
