"""Configurations of well-known models, for plans where the model hub cannot be reached or asks for a token.

Facts of each model's published config.json, as few as a plan needs. A test compares the parameters that follow from
them with the counts that the hub states. A sweep takes the real model.
"""

from __future__ import annotations

import copy
from typing import Any

from workloads.models.source import ModelSource

# Each config.json on the hub; the families' reports: Llama 2 (arXiv 2307.09288), Llama 3 (2407.21783), Qwen2.5
# (2412.15115), Qwen3 (2505.09388), Mistral 7B (2310.06825), SmolLM2 (2502.02737).
_LLAMA_2: dict[str, Any] = dict(model_type="llama", vocab_size=32000, max_position_embeddings=4096)
_LLAMA_3: dict[str, Any] = dict(model_type="llama", vocab_size=128256, max_position_embeddings=8192, rope_theta=5e5)
_LLAMA_31_ROPE: dict[str, Any] = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
_LLAMA_31: dict[str, Any] = _LLAMA_3 | dict(max_position_embeddings=131072, rope_scaling=_LLAMA_31_ROPE)
_LLAMA_32: dict[str, Any] = _LLAMA_31 | dict(rope_scaling=_LLAMA_31_ROPE | dict(factor=32.0), tie_word_embeddings=True)
_QWEN_25: dict[str, Any] = dict(model_type="qwen2", max_position_embeddings=131072, rope_theta=1e6, vocab_size=152064)
_QWEN_25_SMALL: dict[str, Any] = _QWEN_25 | dict(
    max_position_embeddings=32768, vocab_size=151936, tie_word_embeddings=True
)
_QWEN_3: dict[str, Any] = dict(
    model_type="qwen3", max_position_embeddings=40960, rope_theta=1e6, vocab_size=151936, head_dim=128
)
_SMOLLM2: dict[str, Any] = dict(
    model_type="llama", vocab_size=49152, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True
)
_MISTRAL: dict[str, Any] = dict(
    model_type="mistral", vocab_size=32768, max_position_embeddings=32768, rope_theta=1e6, sliding_window=None
)

# Hub id: what its family shares, then hidden size, size of the MLP, layers, heads, key-value heads.
_SIZES: dict[str, tuple[dict[str, Any], int, int, int, int, int]] = {
    "meta-llama/Llama-2-7b-hf": (_LLAMA_2, 4096, 11008, 32, 32, 32),
    "meta-llama/Llama-2-13b-hf": (_LLAMA_2, 5120, 13824, 40, 40, 40),
    "meta-llama/Llama-2-70b-hf": (_LLAMA_2, 8192, 28672, 80, 64, 8),
    "meta-llama/Meta-Llama-3-8B": (_LLAMA_3, 4096, 14336, 32, 32, 8),
    "meta-llama/Meta-Llama-3-70B": (_LLAMA_3, 8192, 28672, 80, 64, 8),
    "meta-llama/Llama-3.1-8B": (_LLAMA_31, 4096, 14336, 32, 32, 8),
    "meta-llama/Llama-3.1-70B": (_LLAMA_31, 8192, 28672, 80, 64, 8),
    "meta-llama/Llama-3.2-1B": (_LLAMA_32 | {"head_dim": 64}, 2048, 8192, 16, 32, 8),
    "meta-llama/Llama-3.2-3B": (_LLAMA_32 | {"head_dim": 128}, 3072, 8192, 28, 24, 8),
    "Qwen/Qwen2.5-0.5B": (_QWEN_25_SMALL, 896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B": (_QWEN_25_SMALL | {"max_position_embeddings": 131072}, 1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-3B": (_QWEN_25_SMALL, 2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-7B": (_QWEN_25, 3584, 18944, 28, 28, 4),
    "Qwen/Qwen2.5-14B": (_QWEN_25, 5120, 13824, 48, 40, 8),
    "Qwen/Qwen2.5-32B": (_QWEN_25, 5120, 27648, 64, 40, 8),
    "Qwen/Qwen2.5-72B": (_QWEN_25, 8192, 29568, 80, 64, 8),
    "Qwen/Qwen3-0.6B": (_QWEN_3 | {"tie_word_embeddings": True}, 1024, 3072, 28, 16, 8),
    "Qwen/Qwen3-1.7B": (_QWEN_3 | {"tie_word_embeddings": True}, 2048, 6144, 28, 16, 8),
    "Qwen/Qwen3-4B": (_QWEN_3 | {"tie_word_embeddings": True}, 2560, 9728, 36, 32, 8),
    "Qwen/Qwen3-8B": (_QWEN_3, 4096, 12288, 36, 32, 8),
    "Qwen/Qwen3-14B": (_QWEN_3, 5120, 17408, 40, 40, 8),
    "Qwen/Qwen3-32B": (_QWEN_3, 5120, 25600, 64, 64, 8),
    "mistralai/Mistral-7B-v0.3": (_MISTRAL, 4096, 14336, 32, 32, 8),
    "HuggingFaceTB/SmolLM2-135M": (_SMOLLM2, 576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M": (_SMOLLM2, 960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B": (_SMOLLM2 | {"rope_theta": 1.3e5}, 2048, 8192, 24, 32, 32),
}
KNOWN_MODELS = tuple(_SIZES)


class KnownModel(ModelSource):
    """A model of which only the configuration is known: it can be planned for, not loaded."""

    @classmethod
    def named(cls, name: str) -> KnownModel | None:
        """The model with this hub id (with or without ``@revision``), or None if it is not in the table."""
        hub_id = name.partition("@")[0]
        # No trial that was trained has such a revision.
        return cls(name, hub_id, "unknown") if hub_id in _SIZES else None

    def _read_config(self) -> Any:
        from transformers import CONFIG_MAPPING

        shared, hidden, inner, layers, heads, key_value_heads = _SIZES[self.location]
        sizes = dict(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
        )  # fmt: skip
        values = {"tie_word_embeddings": False, **copy.deepcopy(shared), **sizes}
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)

    def check_files(self, config: Any) -> tuple[Any, list[str]]:
        """The configuration as it is: there are no files."""
        return config, []
