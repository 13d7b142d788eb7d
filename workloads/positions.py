"""Position interpolation: how a model's rotary positions reach beyond the length it was trained on.

Everything goes through the model's own RoPE configuration, so that stock transformers computes it and loads what is
exported. Factors are relative to the *original* context length, even if the base had been extended before (the
published code puts the relative factor in the place of the old one: 4,096 x 8 stretched to 65,536 got 2, not 16).
"""

from __future__ import annotations

import math
from typing import Any

from workloads.config import Positions
from workloads.errors import InputError

# Kept in the configuration of a model that longspan extended, since linear scaling has no field of its own for it.
ORIGINAL_LENGTH_FIELD = "longspan_original_context_length"


def original_context_length(config: Any) -> int:
    """The context length that the model was pretrained on, in tokens, before anyone extended it.

    Raises:
        InputError: the model has no rotary positions.
    """
    rope = _rope_parameters(config)
    recorded = getattr(config, ORIGINAL_LENGTH_FIELD, None) or rope.get("original_max_position_embeddings")
    # With linear scaling and nothing recorded, max_position_embeddings is the original length: the convention of the
    # paper's released models (4,096 with a factor of 8).
    return int(recorded or config.max_position_embeddings)


def reach(config: Any) -> int:
    """The longest context that the configuration is made for, in tokens."""
    rope = _rope_parameters(config)
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(original_context_length(config) * rope["factor"])
    return config.max_position_embeddings


def extend(config: Any, context_length: int, positions: Positions) -> None:
    """Makes ``config`` (changed in place) reach ``context_length`` by ``positions``.

    Nothing changes where the model already reaches that far. The factor is rounded up to a whole number, as the
    paper's code does (100,000 tokens from 4,096: 25).

    Raises:
        InputError: the model has no rotary positions, or they differ by layer.
    """
    rope = _rope_parameters(config)
    original = original_context_length(config)
    if positions == "none" or context_length <= reach(config):
        return
    kept = ("rope_theta", "partial_rotary_factor")
    extended = {key: rope[key] for key in kept if rope.get(key) is not None}
    extended |= {"rope_type": positions, "factor": float(math.ceil(context_length / original))}
    if positions == "yarn":
        extended["original_max_position_embeddings"] = original
    config.rope_parameters = extended
    # YaRN's factor and the lengths in the configuration have to agree, or stock transformers warns at each load.
    config.max_position_embeddings = int(original * extended["factor"])
    setattr(config, ORIGINAL_LENGTH_FIELD, original)


def _rope_parameters(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise InputError(
            f"a {config.model_type} model has no rotary position embedding (RoPE), so its context cannot be extended "
            "by position interpolation; choose a model with RoPE, such as Llama, Mistral or Qwen"
        )
    if "rope_type" not in rope:
        raise InputError(
            f"a {config.model_type} model has different rotary positions in different layers ({', '.join(rope)}), "
            "which position interpolation does not cover yet; choose a model with one kind"
        )
    return rope
