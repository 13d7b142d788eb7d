"""A model's shape, from its transformers configuration alone: FLOPs, memory and parameter counts follow from it.

Nothing is measured: no weight is loaded and torch is not imported. The modules of each family's layers are in
:mod:`workloads.models.families`; a test compares the counts with those of real models of each family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from workloads.budget.offloading import Offloaded, offloaded_layers
from workloads.config import GradientCheckpointing, TrainingConfig, trained_layers, trains_embeddings, trains_norms
from workloads.errors import InputError
from workloads.models.families import ATTENTION, INPUT_WIDTHS, Reads, Width, family_of, states

FLOAT8_SIDES = 16  # for products in FP8, both sides of a weight must be multiples of it (torch._scaled_mm)
READ_BEFORE: dict[Reads, Reads] = {
    "attention": "attention norm",
    "mlp norm": "attention",
    "activation": "mlp norm",
}
NOT_FLOAT8 = 1  # the last decoder layers, which stay in bfloat16: see workloads/adaptation/float8.py


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module of a decoder layer."""

    name: str
    inputs: int
    outputs: int
    reads: Reads
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of its weight."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Elements of its weight and bias."""
        return self.weights + self.bias * self.outputs

    @property
    def float8(self) -> bool:
        """Whether products in FP8 can take it."""
        return self.inputs % FLOAT8_SIDES == 0 and self.outputs % FLOAT8_SIDES == 0

    @property
    def float8_forwards(self) -> bool:
        """Whether it is in FP8 in the forward pass too: not attention's (workloads/adaptation/float8.py)."""
        return self.float8 and self.reads not in ATTENTION

    def lora_parameters(self, rank: int) -> int:
        """Parameters of its LoRA matrices A and B."""
        return rank * (self.inputs + self.outputs)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only model, all layers alike.

    Args:
        family: its ``model_type``.
        linears: the linear modules of one layer.
        norms, norm_biases, float32_norm_weights, head_norms, gated: as of :class:`workloads.models.families.Family`.
        parallel: attention and MLP both read the layer's input.
        tied: whether the output layer is the embedding matrix.
        rotary: dimensions of a head that rotate.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    linears: tuple[Linear, ...]
    norms: int
    norm_biases: bool
    float32_norm_weights: bool
    head_norms: bool
    gated: bool
    parallel: bool
    tied: bool
    rotary: int

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape of a model with this transformers configuration.

        Raises:
            InputError: longspan does not know its family.
        """
        family = family_of(config)
        heads = config.num_attention_heads
        key_value_heads, head_dim = heads, config.hidden_size // heads
        if family.grouped_queries:
            key_value_heads = getattr(config, "num_key_value_heads", None) or heads
            head_dim = getattr(config, "head_dim", None) or head_dim
        widths: dict[Width, int] = {
            "hidden": config.hidden_size,
            "query": heads * head_dim,
            "key": key_value_heads * head_dim,
            "inner": config.intermediate_size,
        }
        partial = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        return cls(
            family=family.model_type,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            vocab_size=config.vocab_size,
            linears=tuple(
                Linear(
                    name=module.name,
                    inputs=widths[INPUT_WIDTHS[module.reads]],
                    outputs=sum(widths[width] for width in module.outputs),
                    reads=module.reads,
                    bias=states(config, module.bias),
                )
                for module in family.linears
            ),
            norms=family.norms,
            norm_biases=family.norm_biases,
            float32_norm_weights=family.float32_norm_weights,
            head_norms=family.head_norms,
            gated=family.gated,
            parallel=states(config, family.parallel_residual),
            tied=bool(config.tie_word_embeddings),
            rotary=int(head_dim * partial),
        )

    @property
    def query_width(self) -> int:
        """The width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """The width of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def fused_qkv(self) -> bool:
        """Whether one linear module makes queries, keys and values."""
        return sum(linear.reads == "attention norm" for linear in self.linears) == 1

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def norm_parameters(self) -> int:
        """Parameters of the norms of one layer."""
        return self.norms * self.final_norm_parameters + self.head_norms * 2 * self.head_dim

    @property
    def final_norm_parameters(self) -> int:
        """Parameters of one norm over the hidden size."""
        return self.hidden_size * (1 + self.norm_biases)

    @cached_property
    def layer_weights(self) -> int:
        """Weights of the linear modules of one layer, without biases."""
        return sum(linear.weights for linear in self.linears)

    @property
    def linear_parameters(self) -> int:
        """Parameters of the linear modules of one layer."""
        return sum(linear.parameters for linear in self.linears)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the base model; tied embeddings count once."""
        layers = self.num_layers * (self.linear_parameters + self.norm_parameters)
        return layers + self.final_norm_parameters + (1 if self.tied else 2) * self.embedding_parameters


@dataclass(frozen=True)
class Training:
    """Which parameters of a shape train under a :class:`TrainingConfig`, and how far gradients reach.

    Args:
        checkpointing: how many layers recompute their activations, as in ``ExecutionConfig``.
        offloading: how many layers keep theirs in host memory.

    Raises:
        InputError: the choice of layers, or the number of those that recompute or are offloaded, goes beyond the model,
            or a LoRA target is not one of its linear modules.
    """

    shape: ModelShape
    config: TrainingConfig
    checkpointing: GradientCheckpointing = 0
    offloading: int = 0

    def __post_init__(self) -> None:
        known = {linear.name for linear in self.shape.linears}
        if unknown := sorted(set(self.config.lora_targets or ()) - known):
            raise InputError(
                f"lora_targets has {', '.join(unknown)}, which the family {self.shape.family} does not have; "
                f"its linear modules: {', '.join(sorted(known))}"
            )
        if self.checkpointing != "all" and self.checkpointing > self.shape.num_layers:
            raise InputError(
                f"gradient_checkpointing is {self.checkpointing}, but the model has {self.shape.num_layers} layers"
            )
        if self.offloading > self.shape.num_layers:
            raise InputError(
                f"offload_activations is {self.offloading}, but the model has {self.shape.num_layers} layers"
            )
        _ = self.layers

    @cached_property
    def layers(self) -> frozenset[int]:
        """The decoder layers in which something trains."""
        if self.config.method == "untuned":
            return frozenset()
        return frozenset(trained_layers(self.config.train_layers, self.shape.num_layers))

    @property
    def lora(self) -> bool:
        """Whether the method is one of LoRA's."""
        return self.config.method.startswith("lora")

    @property
    def embeddings(self) -> bool:
        """Whether the embeddings train."""
        return trains_embeddings(self.config.method, self.config.train_layers)

    @property
    def final_norm(self) -> bool:
        """Whether the final norm trains."""
        whole = self.config.method != "full" or self.config.train_layers == "all"
        return trains_norms(self.config.method) and whole

    @property
    def output(self) -> bool:
        """Whether the output layer's weight trains: with ``full``, or with the embeddings that it is tied to."""
        return self.embeddings and (self.config.method == "full" or self.shape.tied)

    def norms(self, layer: int) -> bool:
        """Whether the norms of a layer train."""
        return layer in self.layers and trains_norms(self.config.method)

    def weights(self, layer: int) -> bool:
        """Whether the linear weights of a layer train themselves."""
        return layer in self.layers and self.config.method == "full"

    def in_float8(self, layer: int) -> bool:
        """Whether the frozen linear modules of a layer multiply in FP8, in the backward pass at least."""
        return self.config.quantization == "fp8" and layer < self.shape.num_layers - NOT_FLOAT8

    def adapted(self, layer: int) -> frozenset[str]:
        """The linear modules of a layer that have LoRA matrices."""
        return self._targets if self.lora and layer in self.layers else frozenset()

    @cached_property
    def _targets(self) -> frozenset[str]:
        if self.config.lora_targets is not None:
            return frozenset(self.config.lora_targets)
        return frozenset(linear.name for linear in self.shape.linears if linear.reads in ATTENTION)

    def reaches_input(self, layer: int) -> bool:
        """Whether a gradient flows out of a layer to the modules before it."""
        return self.embeddings or self._first < layer

    @cached_property
    def _first(self) -> int:
        return min(self.layers, default=self.shape.num_layers)

    @cached_property
    def backward(self) -> range:
        """The layers that have a backward pass: from the first in or before which something trains."""
        return range(0 if self.embeddings else self._first, self.shape.num_layers)

    @cached_property
    def offloaded(self) -> tuple[Offloaded[int], ...]:
        """The layers that keep their activations in host memory (workloads/training/offload.py)."""
        return offloaded_layers(self.backward, self.offloading)

    @cached_property
    def away(self) -> frozenset[int]:
        """The indices of offloaded layers."""
        return frozenset(each.layer for each in self.offloaded)

    @cached_property
    def checkpointed(self) -> tuple[int, ...]:
        """The layers that recompute (workloads/training/recompute.py): the first that are not offloaded."""
        others = tuple(layer for layer in self.backward if layer not in self.away)
        return others if self.checkpointing == "all" else others[: self.checkpointing]

    def needs_gradient(self, layer: int, what: Reads) -> bool:
        """Whether the gradient of an input of a layer's linear modules is needed by parameters before it."""
        if what == "attention norm" or (what == "mlp norm" and self.shape.parallel):
            return self.norms(layer) or self.reaches_input(layer)
        before = READ_BEFORE[what]
        return self.norms(layer) or self.needs_gradient(layer, before) or self._trains_in(layer, before)

    def _trains_in(self, layer: int, reads: Reads) -> bool:
        adapted = self.adapted(layer)
        return self.weights(layer) or any(each.reads == reads and each.name in adapted for each in self.shape.linears)

    @cached_property
    def alike(self) -> list[list[int]]:
        """All layers, grouped by what sets their cost.

        That is what trains, gradients, whether activations are recomputed or offloaded, FP8, and an even or odd index.
        """
        alike: dict[tuple, list[int]] = {}
        for layer in range(self.shape.num_layers):
            stored = layer in self.checkpointed, layer in self.away
            kind = layer in self.layers, self.reaches_input(layer), stored, self.in_float8(layer), layer % 2
            alike.setdefault(kind, []).append(layer)
        return list(alike.values())

    @property
    def kinds(self) -> list[tuple[int, int]]:
        """The same groups as (first layer, number of layers)."""
        return [(layers[0], len(layers)) for layers in self.alike]

    @cached_property
    def lora_parameters(self) -> int:
        """Parameters of all LoRA matrices."""
        one_layer = sum(
            linear.lora_parameters(self.config.lora_rank)
            for linear in self.shape.linears
            if linear.name in self._targets
        )
        return len(self.layers) * one_layer if self.lora else 0

    @cached_property
    def linear_weights(self) -> int:
        """Trained weights of linear modules, without LoRA's: those that autocast casts whole."""
        weights = self.shape.layer_weights
        return self.output * self.shape.embedding_parameters + sum(map(self.weights, self.layers)) * weights

    @cached_property
    def trainable(self) -> int:
        """Trainable parameters."""
        shape = self.shape
        count = self.lora_parameters + self.final_norm * shape.final_norm_parameters
        count += (self.embeddings + (self.output and not shape.tied)) * shape.embedding_parameters
        count += sum(map(self.norms, self.layers)) * shape.norm_parameters
        return count + sum(map(self.weights, self.layers)) * shape.linear_parameters

    @cached_property
    def frozen(self) -> int:
        """Frozen parameters."""
        return self.parameters - self.trainable

    @cached_property
    def parameters(self) -> int:
        """All parameters, LoRA's included."""
        return self.shape.parameters + self.lora_parameters


@lru_cache(maxsize=1024)
def what_trains(
    shape: ModelShape, config: TrainingConfig, checkpointing: GradientCheckpointing = 0, offloading: int = 0
) -> Training:
    """Returns the :class:`Training` of these arguments, made once."""
    return Training(shape, config, checkpointing, offloading)
