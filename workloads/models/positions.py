"""How a model's rotary positions reach beyond the length it was trained on.

Everything goes through the model's own RoPE configuration, so that stock transformers computes it and loads what is
exported. Factors are relative to the *original* context length, even if the base had been extended before (the
published code puts the relative factor in the place of the old one: 4,096 x 8 stretched to 65,536 got 2, not 16).

With a factor s, over an original length L, and theta_i the inverse frequency of one of d rotated dimensions:

    linear   position interpolation (arXiv 2306.15595): theta_i / s, the paper's choice
    ntk      NTK-aware (bloc97, 2023): the base grows by s ** (d / (d - 2)), so that the slowest dimension is stretched
             by s and the fastest stays
    dynamic  dynamic NTK (emozilla, 2023): the same, with s * l / L - (s - 1) for s at a sequence of l > L tokens and
             nothing changed up to L. Stock transformers computes it anew when a longer sequence comes, and keeps it
             until one shorter than L does
    yarn     YaRN (arXiv 2309.00071): slow dimensions are stretched by s, fast ones stay, between them a ramp; cosine
             and sine are scaled by 0.1 ln(s) + 1
    llama3   Llama 3.1's: wavelengths over L are stretched by s, those below L / 4 stay, between them a blend
"""

from __future__ import annotations

import math
from typing import Any

from workloads.config import Positions
from workloads.errors import InputError

# Kept in the configuration of a model that longspan extended: linear scaling has no field of its own for the length,
# and NTK-aware scaling none for the base that it replaces.
ORIGINAL_LENGTH_FIELD = "longspan_original_context_length"
ORIGINAL_THETA_FIELD = "longspan_original_rope_theta"


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


def is_extended(config: Any) -> bool:
    """Whether the model's positions reach beyond its original context already."""
    return reach(config) > original_context_length(config)


def extended_by_longspan(config: Any) -> bool:
    return hasattr(config, ORIGINAL_LENGTH_FIELD)


def extend(config: Any, context_length: int, positions: Positions) -> None:
    """Makes ``config`` (changed in place) reach ``context_length`` by ``positions``.

    Nothing changes where the model already reaches that far. The factor is rounded up to a whole number, as the
    paper's code does (100,000 tokens from 4,096: 25).

    Raises:
        InputError: the model has no rotary positions, they differ by layer, or its family does not take these.
    """
    rope = _rope_parameters(config)
    original = original_context_length(config)
    if positions == "none" or context_length <= reach(config):
        return
    factor = float(math.ceil(context_length / original))
    theta = getattr(config, ORIGINAL_THETA_FIELD, None) or rope["rope_theta"]
    extended = {"rope_type": positions, "rope_theta": theta, "factor": factor}
    if rope.get("partial_rotary_factor") is not None:
        extended["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if positions == "ntk":
        dimensions = _rotated_dimensions(config)
        stretched = theta * factor ** (dimensions / (dimensions - 2))
        extended |= {"rope_type": "default", "rope_theta": stretched}
        del extended["factor"]
        setattr(config, ORIGINAL_THETA_FIELD, theta)
    if positions in ("yarn", "llama3"):
        extended["original_max_position_embeddings"] = original
    if positions == "llama3":
        extended |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # as in Llama 3.1
    config.rope_parameters = extended
    # Dynamic NTK reads it as the original length. With YaRN it has to agree with the factor, or stock transformers
    # warns at each load.
    config.max_position_embeddings = original if positions == "dynamic" else int(original * factor)
    setattr(config, ORIGINAL_LENGTH_FIELD, original)
    _refuse_what_the_family_does_not_take(config, positions)


def _rotated_dimensions(config: Any) -> int:
    """How many dimensions of a head are rotated: GPT-NeoX and Phi rotate a part of them."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * (config.rope_parameters.get("partial_rotary_factor") or 1.0))


def _refuse_what_the_family_does_not_take(config: Any, positions: Positions) -> None:
    """A family's configuration may allow few kinds (Phi-3), and would not load again, or load as something else."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        again = type(config).from_dict(config.to_dict())
    except (StrictDataclassError, ValueError, KeyError) as error:
        reason = str(error.__cause__ or error)
    else:
        if again.rope_parameters == config.rope_parameters:
            return
        reason = f"they would load as {again.rope_parameters}"
    raise InputError(
        f"positions {positions!r}: a {config.model_type} model's configuration does not take them ({reason}); choose "
        "ntk, which every model with RoPE takes"
    )


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
