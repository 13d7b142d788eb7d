"""The model families that longspan knows: what their layers are made of, and which models are refused and why.

Imports no torch. A test of each family holds that the counts that follow from its record equal those of a real model,
and that the whole model under a pattern equals the stock model given the dense mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from workloads.errors import InputError
from workloads.registry import Registry

# What a linear module reads: the first norm, attention's output, the second norm, or what the activation function made.
Reads = Literal["attention norm", "attention", "mlp norm", "activation"]
# Sides of linear modules: the hidden size, all query heads, all key (or value) heads, the width inside the MLP.
Width = Literal["hidden", "query", "key", "inner"]
INPUT_WIDTHS: dict[Reads, Width] = {
    "attention norm": "hidden",
    "attention": "query",
    "mlp norm": "hidden",
    "activation": "inner",
}
ATTENTION: tuple[Reads, ...] = ("attention norm", "attention")
# A fact of a family, or the field of a model's configuration that states it (false where the field is missing).
Fact = bool | str


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A linear module of a decoder layer.

    Args:
        name: the last part of its name.
        reads: what it reads.
        outputs: the widths that make up its output.
        bias: whether it has one.
    """

    name: str
    reads: Reads
    outputs: tuple[Width, ...]
    bias: Fact = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model family.

    Args:
        model_type: as configurations state it.
        name: for people.
        linears: the linear modules of a decoder layer, in the order of computation.
        norms: norms of a layer over the hidden size.
        norm_biases: whether norms have a bias as well (LayerNorm).
        float32_norm_weights: whether norms multiply by their weight before they cast back from float32.
        head_norms: whether queries and keys are normalised, each over a head's dimension.
        gated: whether the MLP's activation is multiplied by a gate.
        grouped_queries: whether configurations may have fewer key/value heads than heads, and a head dimension.
        parallel_residual: whether attention and MLP both read the layer's input.
        softcap: the field of configurations with the bound s on the logits, s tanh(logits / s); None if unbounded.
        refused: why no model of the family can be loaded for training; None if models can.
    """

    model_type: str
    name: str
    linears: tuple[LinearModule, ...]
    norms: int = 2
    norm_biases: bool = False
    float32_norm_weights: bool = False
    head_norms: bool = False
    gated: bool = True
    grouped_queries: bool = True
    parallel_residual: Fact = False
    softcap: str | None = None
    refused: str | None = None


def _llama_linears(*, input_bias: Fact, output_bias: Fact, mlp_bias: Fact = False) -> tuple[LinearModule, ...]:
    """The modules that Llama has and most families took over, with biases or without."""
    return (
        LinearModule("q_proj", "attention norm", ("query",), input_bias),
        LinearModule("k_proj", "attention norm", ("key",), input_bias),
        LinearModule("v_proj", "attention norm", ("key",), input_bias),
        LinearModule("o_proj", "attention", ("hidden",), output_bias),
        LinearModule("gate_proj", "mlp norm", ("inner",), mlp_bias),
        LinearModule("up_proj", "mlp norm", ("inner",), mlp_bias),
        LinearModule("down_proj", "activation", ("hidden",), mlp_bias),
    )


ATTENTION_BIAS = "attention_bias"
CONFIGURED_BIAS = _llama_linears(input_bias=ATTENTION_BIAS, output_bias=ATTENTION_BIAS)

FAMILIES = Registry(
    "model family",
    (
        Family(
            model_type="llama",
            name="Llama",
            linears=_llama_linears(input_bias=ATTENTION_BIAS, output_bias=ATTENTION_BIAS, mlp_bias="mlp_bias"),
        ),
        Family(
            model_type="mistral",
            name="Mistral",
            linears=_llama_linears(input_bias=False, output_bias=False),
        ),
        Family(
            model_type="qwen2",
            name="Qwen2",
            linears=_llama_linears(input_bias=True, output_bias=False),
        ),
        Family(
            model_type="qwen3",
            name="Qwen3",
            linears=CONFIGURED_BIAS,
            head_norms=True,
        ),
        Family(
            model_type="gpt_neox",
            name="GPT-NeoX",
            linears=(
                LinearModule("query_key_value", "attention norm", ("query", "key", "key"), ATTENTION_BIAS),
                LinearModule("dense", "attention", ("hidden",), ATTENTION_BIAS),
                LinearModule("dense_h_to_4h", "mlp norm", ("inner",), True),
                LinearModule("dense_4h_to_h", "activation", ("hidden",), True),
            ),
            norm_biases=True,
            gated=False,
            grouped_queries=False,
            parallel_residual="use_parallel_residual",
        ),
        Family(
            model_type="phi3",
            name="Phi-3",
            linears=(
                LinearModule("qkv_proj", "attention norm", ("query", "key", "key")),
                LinearModule("o_proj", "attention", ("hidden",)),
                LinearModule("gate_up_proj", "mlp norm", ("inner", "inner")),
                LinearModule("down_proj", "activation", ("hidden",)),
            ),
        ),
        Family(
            model_type="gemma",
            name="Gemma",
            linears=CONFIGURED_BIAS,
            float32_norm_weights=True,
        ),
        Family(
            model_type="gemma2",
            name="Gemma 2",
            linears=CONFIGURED_BIAS,
            norms=4,
            float32_norm_weights=True,
            softcap="final_logit_softcapping",
        ),
        Family(
            model_type="gemma3_text",
            name="Gemma 3",
            linears=CONFIGURED_BIAS,
            norms=4,
            float32_norm_weights=True,
            head_norms=True,
            softcap="final_logit_softcapping",
            refused="its layers differ in their rotary positions, which workloads/models/positions.py refuses",
        ),
    ),
    key="model_type",
)

# The attention projections of all families, which LoRA adapts by default.
ATTENTION_PROJECTIONS = tuple(
    dict.fromkeys(linear.name for family in FAMILIES.values() for linear in family.linears if linear.reads in ATTENTION)
)
# Linear modules of a layer that read the same tensor, in the order of computation.
SAME_INPUT = tuple(
    dict.fromkeys(
        names
        for family in FAMILIES.values()
        for reads in INPUT_WIDTHS
        if len(names := tuple(linear.name for linear in family.linears if linear.reads == reads)) > 1
    )
)


def family_of(config: Any) -> Family:
    """The family of a model with this transformers configuration.

    Raises:
        InputError: longspan does not know it.
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        usable = [family.name for family in FAMILIES.values() if not family.refused]
        raise InputError(
            f"a {model_type} model is of no family that longspan knows: it can neither tell what the model costs nor "
            f"give it an attention pattern; choose a model of the families {', '.join(usable)}"
        )
    return FAMILIES[model_type]


def states(config: Any, fact: Fact) -> bool:
    """Whether a fact is true of a model with this configuration."""
    return bool(getattr(config, fact, False)) if isinstance(fact, str) else fact


def logits_softcap(config: Any) -> float | None:
    """The bound on the logits of a model with this configuration; None if they are not bounded."""
    field = family_of(config).softcap
    return getattr(config, field, None) if field else None


def refuse_unsupported(config: Any) -> None:
    """Raises InputError, with the reason, if a model of this configuration cannot take an attention pattern."""
    kind = family_of(config).model_type
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


def refuse_sliding_windows(config: Any) -> None:
    """Raises InputError if some layers attend in a sliding window, which a pattern would silently replace."""
    layer_types = getattr(config, "layer_types", None) or []
    found = ", ".join(sorted({kind for kind in layer_types if kind != "full_attention"}))
    window = getattr(config, "sliding_window", None)
    if window and not layer_types and getattr(config, "use_sliding_window", True):
        found = f"a window of {window} tokens"
    if found:
        raise InputError(
            f"a {config.model_type} model whose layers do not all attend fully ({found}): longspan's attention "
            "patterns would silently replace its windows. Choose a model with full attention in every layer"
        )
