"""Extends a model's rotary positions beyond the length it was trained on.

Everything goes through the model's own RoPE configuration, so stock transformers computes it and loads what is
exported. Factors are relative to the *original* context length, even if the base was extended before (the published
code replaces the old factor by the relative one: 4,096 x 8 stretched to 65,536 got 2, not 16). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from workloads.errors import InputError
from workloads.registry import Registry

# Kept in the configuration of a model that longspan extended: linear scaling has no field of its own for the length,
# and NTK-aware scaling none for the base that it replaces.
ORIGINAL_LENGTH_FIELD = "longspan_original_context_length"
ORIGINAL_THETA_FIELD = "longspan_original_rope_theta"
# The types of rotary positions that a base may come with.
READABLE = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """What is stretched.

    Args:
        original: the original context length L, in tokens.
        factor: how many times as long the context becomes: s.
        theta: the original base of the rotary frequencies.
        dimensions: the rotated dimensions of a head: d.
        kept: parameters of the model's rotary positions that stay as they are.
    """

    original: int
    factor: float
    theta: float
    dimensions: int
    kept: dict[str, Any] = field(default_factory=dict)

    def scaled(self, rope_type: str) -> dict[str, Any]:
        """Parameters of one of transformers' types that takes a factor."""
        return {"rope_type": rope_type, "rope_theta": self.theta, "factor": self.factor, **self.kept}


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionKind:
    """A way to extend rotary positions. ``theta_i`` is the inverse frequency of a rotated dimension.

    Args:
        name: the name that ``--positions`` takes.
        label: the name in reports and model cards.
        source: what it does, and the paper or author it is from.
        parameters: the ``rope_parameters`` that it writes into the configuration; None changes nothing.
        keeps_length: whether ``max_position_embeddings`` stays the original length, by which other programs multiply
            the factor (vLLM and SGLang for linear and dynamic, transformers for dynamic).
    """

    name: str
    label: str
    source: str
    parameters: Callable[[Stretch], dict[str, Any]] | None
    keeps_length: bool = False


def _ntk_parameters(stretch: Stretch) -> dict[str, Any]:
    dimensions = stretch.dimensions
    stretched = stretch.theta * stretch.factor ** (dimensions / (dimensions - 2))
    return {"rope_type": "default", "rope_theta": stretched, **stretch.kept}


def _yarn_parameters(stretch: Stretch) -> dict[str, Any]:
    return {**stretch.scaled("yarn"), "original_max_position_embeddings": stretch.original}


def _llama3_parameters(stretch: Stretch) -> dict[str, Any]:
    as_in_llama_3_1 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {**stretch.scaled("llama3"), "original_max_position_embeddings": stretch.original, **as_in_llama_3_1}


POSITIONS = Registry(
    "kind of positions",
    (
        PositionKind(
            name="linear",
            label="linear interpolation",
            source="position interpolation (arXiv 2306.15595): theta_i / s, the paper's choice",
            parameters=lambda stretch: stretch.scaled("linear"),
            keeps_length=True,
        ),
        PositionKind(
            name="ntk",
            label="NTK-aware positions",
            source="NTK-aware (bloc97, 2023): the base grows by s ** (d / (d - 2)), so the slowest dimension is "
            "stretched by s and the fastest stays",
            parameters=_ntk_parameters,
        ),
        PositionKind(
            name="dynamic",
            label="dynamic NTK",
            source="dynamic NTK (emozilla, 2023): NTK-aware with s * l / L - (s - 1) for s at a sequence of l > L "
            "tokens, unchanged up to L. Stock transformers recomputes it when a longer sequence comes, and keeps it "
            "until one shorter than L does",
            parameters=lambda stretch: stretch.scaled("dynamic"),
            keeps_length=True,
        ),
        PositionKind(
            name="yarn",
            label="YaRN",
            source="YaRN (arXiv 2309.00071): slow dimensions are stretched by s, fast ones stay, between them a ramp; "
            "cosine and sine are scaled by 0.1 ln(s) + 1",
            parameters=_yarn_parameters,
        ),
        PositionKind(
            name="llama3",
            label="Llama-3 scaling",
            source="Llama 3.1: wavelengths over L are stretched by s, those below L / 4 stay, between them a blend",
            parameters=_llama3_parameters,
        ),
        PositionKind(name="none", label="no change", source="the model's own positions", parameters=None),
    ),
)
# For type checkers and the command line; a test holds it equal to the registry.
Positions = Literal["linear", "ntk", "dynamic", "yarn", "llama3", "none"]


@dataclass(frozen=True, slots=True)
class Reach:
    """The contexts that a configuration is made for, in tokens.

    Args:
        original: the length that the model was pretrained on, before it was extended.
        longest: the longest context.
        assumption: what was assumed where the configuration leaves it open.
    """

    original: int
    longest: int
    assumption: str | None = None


def reach(config: Any) -> Reach:
    """Returns how far a model's positions reach: by their own settings, and by ``max_position_embeddings`` last.

    Raises:
        InputError: the model has no rotary positions, they differ by layer, or are of an unknown type.
    """
    rope, stated = _rope_parameters(config), int(config.max_position_embeddings)
    kind, factor = rope["rope_type"], float(rope.get("factor") or 0)
    recorded = getattr(config, ORIGINAL_LENGTH_FIELD, None)
    if kind == "linear":
        known = recorded or rope.get("original_max_position_embeddings")
        original = int(known or stated)
        assumed = (
            f"max_position_embeddings is {stated:,} beside a linear factor of {factor:g}: taken for the original "
            f"length, as transformers documents it, so the model reaches {int(original * factor):,} tokens; if it "
            f"reaches {stated:,}, its original length is {round(stated / factor):,}"
        )
        return Reach(original, int(original * factor), None if known else assumed)
    if kind == "dynamic":  # transformers takes max_position_embeddings for the original length
        return Reach(int(recorded or stated), int(stated * factor))
    original = int(recorded or rope.get("original_max_position_embeddings") or stated)
    if kind == "yarn" and factor:
        # max_position_embeddings may be the original length (Qwen2.5), the longest, or something else.
        return Reach(original, int(original * factor))
    if kind in ("longrope", "llama3") and stated <= original and factor:
        return Reach(original, int(original * factor))
    return Reach(original, stated)


def original_context_length(config: Any) -> int:
    """Returns the context length that the model was pretrained on, in tokens, before it was extended.

    Raises:
        InputError: as :func:`reach`.
    """
    return reach(config).original


def max_context_length(config: Any) -> int:
    """Returns the longest context that the configuration is made for, in tokens."""
    return reach(config).longest


def is_extended(config: Any) -> bool:
    """Whether the model's positions already reach beyond its original context."""
    return max_context_length(config) > original_context_length(config)


def extended_by_longspan(config: Any) -> bool:
    """Whether longspan wrote the positions of this configuration."""
    return hasattr(config, ORIGINAL_LENGTH_FIELD)


def extend(config: Any, context_length: int, positions: Positions) -> None:
    """Changes ``config`` in place so that it reaches ``context_length`` by ``positions``.

    Nothing changes where the model already reaches that far. The factor is rounded up to a whole number, as the
    paper's code does (100,000 tokens from 4,096: 25).

    Raises:
        InputError: the model has no rotary positions, they differ by layer, or its family does not take these.
    """
    rope = _rope_parameters(config)
    original = original_context_length(config)
    kind = POSITIONS[positions]
    if kind.parameters is None or context_length <= max_context_length(config):
        return
    stretch = Stretch(
        original=original,
        factor=float(math.ceil(context_length / original)),
        theta=getattr(config, ORIGINAL_THETA_FIELD, None) or rope["rope_theta"],
        dimensions=_rotated_dimensions(config),
        kept={name: rope[name] for name in ("partial_rotary_factor",) if rope.get(name) is not None},
    )
    config.rope_parameters = kind.parameters(stretch)
    if config.rope_parameters["rope_theta"] != stretch.theta:
        setattr(config, ORIGINAL_THETA_FIELD, stretch.theta)
    # With YaRN it has to agree with the factor, or stock transformers warns at each load.
    config.max_position_embeddings = original if kind.keeps_length else int(original * stretch.factor)
    setattr(config, ORIGINAL_LENGTH_FIELD, original)
    _refuse_unloadable(config, positions)


def _rotated_dimensions(config: Any) -> int:
    """How many dimensions of a head are rotated: GPT-NeoX and Phi rotate a part of them."""
    return int(_head_dimensions(config) * (config.rope_parameters.get("partial_rotary_factor") or 1.0))


def _head_dimensions(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse_unloadable(config: Any, positions: Positions) -> None:
    """Raises InputError if the configuration would not load again, or would load as something else (Phi-3)."""
    try:
        again = type(config).from_dict(config.to_dict())
    except Exception as error:  # of transformers' checks, which differ by family
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
    if "rope_type" in rope and rope["rope_type"] not in READABLE:
        raise InputError(
            f"a {config.model_type} model with rotary positions of type {rope['rope_type']!r} (rope_parameters or "
            f"rope_scaling in its config.json); expected one of {', '.join(READABLE)}"
        )
    if rope.get("rope_type") in ("linear", "dynamic") and not rope.get("factor"):
        raise InputError(
            f"a {config.model_type} model with {rope['rope_type']} rotary positions but no factor (rope_parameters or "
            "rope_scaling in its config.json); add the factor that it was trained with"
        )
    if "rope_type" not in rope:
        raise InputError(
            f"a {config.model_type} model has different rotary positions in different layers ({', '.join(rope)}), "
            "which position interpolation does not cover yet; choose a model with one kind"
        )
    _check_dimensions(config, rope)
    return rope


def _check_dimensions(config: Any, rope: dict[str, Any]) -> None:
    """Raises InputError unless a part of each head is rotated, with LongRoPE by a factor for each pair of it."""
    rotated, head = _rotated_dimensions(config), _head_dimensions(config)
    if not 2 <= rotated <= head:
        raise InputError(
            f"a {config.model_type} model that rotates {rotated} of a head's {head} dimensions (partial_rotary_factor "
            "in its config.json); expected at least 2, and at most all"
        )
    for name in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
        if len(rope.get(name) or ()) != rotated // 2:
            raise InputError(
                f"a {config.model_type} model with {len(rope.get(name) or ())} values as {name} (rope_parameters or "
                f"rope_scaling in its config.json); expected {rotated // 2}, half of the rotated dimensions of a head"
            )
