"""Activations: the bytes that each part of a model keeps for its backward pass, for each token.

What is kept follows from the code that runs: transformers' model code, PEFT's LoRA layers, torch's autograd and
autocast, and this package's attention. A test sums the distinct storages that autograd saves in real models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from workloads.attention.patterns import PATTERNS
from workloads.budget.shape import Linear, Training
from workloads.config import Precision
from workloads.models.families import Reads

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Bytes of a number, by what it is.

    Args:
        compute: inputs and outputs of matrix products.
        frozen: a frozen weight.
        trained: a weight that trains, its gradient and each of its optimiser's two moments; for LoRA's, ``lora``.
        narrow: embeddings and norms that train return the compute type too, and LoRA reads it; else they return float32
            through all layers, and PEFT casts LoRA's inputs.
        autocast: whether torch.autocast casts to the compute type; else each product computes in its inputs' type.
    """

    compute: int
    frozen: int
    trained: int = FLOAT32
    lora: int = FLOAT32
    narrow: bool = False
    autocast: bool = True

    @classmethod
    def of(cls, precision: Precision) -> Widths:
        """This package's rule: what trains is float32, and bfloat16 otherwise means autocast."""
        if precision == "float32":
            return cls(compute=FLOAT32, frozen=FLOAT32, autocast=False)
        return cls(compute=2, frozen=2)


@dataclass(frozen=True)
class Activations:
    """What a model keeps under a configuration: bytes a token.

    Args:
        rows: sequences in a forward pass.
        masked: attention takes a mask of queries by keys, which is kept.
        compiled: layers are compiled, and keep only what cannot be recomputed without a matrix product.
        one_operator: see :class:`workloads.budget.loop.Loop`.
    """

    trains: Training
    widths: Widths
    rows: int = 1
    masked: bool = False
    compiled: bool = False
    one_operator: bool = False

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream.

        Embeddings that train make it float32 through all layers, unless it is kept narrow.
        """
        if self.widths.narrow:
            return self.widths.compute
        return self.widths.trained if self.trains.embeddings else self.widths.frozen

    @property
    def layer_input(self) -> int:
        """What gradient checkpointing keeps for a layer."""
        return self.residual * self.trains.shape.hidden_size

    def layer(self, layer: int) -> float:
        """What a layer keeps without checkpointing; with it, during its backward pass."""
        if self.compiled:
            return self._from_products(layer) + self._inputs_once(layer) if layer in self.trains.backward else 0.0
        return self.attention_part(layer) + self.mlp_part(layer)

    def _from_products(self, layer: int) -> float:
        """The least that a frozen layer's backward pass needs without repeating a matrix product or attention.

        torch.compile keeps it: the layer's input, queries, keys and values, attention's output, the sum after it, and
        the inputs of the activation function and its gate. 2.99 MB a token in Llama-2-7B.
        """
        shape, compute = self.trains.shape, self.widths.compute
        stream = self.residual * shape.hidden_size * (1 if shape.parallel else 2)
        attention = compute * (2 * shape.query_width + 2 * shape.key_value_width) + FLOAT32 * shape.num_heads
        mlp = compute * shape.intermediate_size * (2 if shape.gated else 1)
        after_norms = compute * shape.hidden_size * (shape.norms == 4)  # the last norm's input
        return stream + attention + mlp + after_norms

    def _inputs_once(self, layer: int) -> float:
        """Inputs of linear modules that train or have LoRA matrices: one copy for all modules with the same input.

        With :meth:`_from_products` it gives the 47.6 GiB that Llama-2-7B took compiled on an H200 (LoRA+, 8,192
        tokens, no checkpointing, all in bfloat16 but LoRA's matrices; 69.0 GiB not compiled).
        """
        trains, widths = self.trains, self.widths
        kept = 0.0
        for reads in get_args(Reads):
            linears = [linear for linear in trains.shape.linears if linear.reads == reads]
            adapted = [linear for linear in linears if linear.name in trains.adapted(layer)]
            if adapted or trains.weights(layer):
                number = widths.lora if adapted and not widths.autocast else widths.compute
                already = reads == "attention" and number == widths.compute
                kept += number * linears[0].inputs * (not already) + sum(map(self._lora, adapted))
        return kept

    def attention_part(self, layer: int) -> float:
        """From the layer's first norm to its first residual sum."""
        trains, shape, compute = self.trains, self.trains.shape, self.widths.compute
        trained = trains.norms(layer)
        kept = self._norm(shape.hidden_size, 1, self.residual, trains.reaches_input(layer), trained)
        kept += self._inputs(layer, "attention norm", self.norm_output(trained))
        flows = trains.needs_gradient(layer, "attention")
        if shape.head_norms:
            for width in (shape.query_width, shape.key_value_width):
                kept += self._norm(width, width // shape.head_dim, compute, flows, trained)
        if flows:
            value = shape.query_width + 2 * shape.key_value_width if shape.fused_qkv else shape.key_value_width
            kept += compute * (2 * shape.query_width + shape.key_value_width + value) + FLOAT32 * shape.num_heads
            kept += self._moved_groups(layer) * (not self.one_operator)
            if self.masked:  # a boolean, and the number added to the score, for each head and key
                kept += (1 + compute) * shape.num_heads * trains.config.context_length
        # Where autograd joins the parts of heads, attention's output layer reads the joined copy.
        joined = self.shifted_heads(layer) > 0 and not self.one_operator
        kept += self._inputs(layer, "attention", compute, kept_already=flows and not joined)
        if shape.norms == 4:
            kept += self._norm(shape.hidden_size, 1, compute, trains.needs_gradient(layer, "mlp norm"), trained)
        return kept

    def mlp_part(self, layer: int) -> float:
        """The rest of the layer."""
        trains, shape, compute = self.trains, self.trains.shape, self.widths.compute
        trained = trains.norms(layer)
        reached = trains.reaches_input(layer) if shape.parallel else trains.needs_gradient(layer, "mlp norm")
        kept = self._norm(shape.hidden_size, 1, self.residual, reached, trained)
        kept += self._inputs(layer, "mlp norm", self.norm_output(trained))
        if trains.needs_gradient(layer, "activation"):
            # The activation function's input; with a gate also its output and the other factor.
            kept += compute * shape.intermediate_size * (3 if shape.gated else 1)
        kept += self._inputs(layer, "activation", compute)
        if shape.norms == 4:
            kept += self._norm(shape.hidden_size, 1, compute, layer in trains.backward, trained)
        return kept

    def head(self) -> float:
        """The final norm and the output layer, without the logits."""
        trains, shape = self.trains, self.trains.shape
        kept = self.final_norm()
        if trains.output:
            output = self.norm_output(trains.final_norm)
            kept += shape.hidden_size * (self.widths.compute if self.widths.autocast else output)
        return kept

    def final_norm(self) -> float:
        """What the final norm keeps."""
        trains = self.trains
        return self._norm(trains.shape.hidden_size, 1, self.residual, trains.trainable > 0, trains.final_norm)

    def backward_work(self, layer: int) -> float:
        """The peak of a layer's backward pass beside its activations: gradients between its operations."""
        shape, compute = self.trains.shape, self.widths.compute
        stream = 2 * self.residual * shape.hidden_size
        mlp = compute * shape.intermediate_size * (3 if shape.gated else 2)
        heads = 2 * shape.query_width + 2 * shape.key_value_width
        attention = FLOAT32 * heads - self.mlp_part(layer)
        return stream + max(mlp, attention)

    def _norm(self, width: int, statistics: int, given: int, reached: bool, trained: bool) -> float:
        if self.trains.shape.norm_biases:  # LayerNorm: its input, mean and deviation; autocast makes it float32
            number = FLOAT32 if self.widths.autocast else given
            return (number * width + 2 * FLOAT32 * statistics) * (reached or trained)
        # RMSNorm computes in float32: a copy of its input (or the input) and a root for each mean.
        kept = FLOAT32 * (width + statistics) * reached
        # For the weight's gradient the tensor it multiplies, cast back before (Llama) or not (Gemma).
        return kept + width * trained * (FLOAT32 if self.trains.shape.float32_norm_weights else given)

    def norm_output(self, trained: bool) -> int:
        """Bytes of a number of a norm's output; ``trained``: its weight trains."""
        shape = self.trains.shape
        if self.widths.narrow:
            return self.widths.compute
        if shape.norm_biases and self.widths.autocast:
            return FLOAT32
        if shape.norm_biases or shape.float32_norm_weights:
            return self.residual
        return max(self.residual, self.widths.trained if trained else self.widths.frozen)

    def _inputs(self, layer: int, reads: Reads, given: int, kept_already: bool = False) -> float:
        """The inputs that linear modules keep for the gradients of weights; ``given`` is bytes of a number."""
        trains, widths = self.trains, self.widths
        linears = [linear for linear in trains.shape.linears if linear.reads == reads]
        width = linears[0].inputs
        copies, itself = 0.0, False
        for linear in linears:
            if trains.weights(layer):
                # Autocast casts the input once for each module.
                cast = widths.autocast and given != widths.compute
                copies += widths.compute * width * cast
                itself |= not cast
            elif linear.name in trains.adapted(layer):
                copies += self._lora(linear)
                # PEFT casts to the type of LoRA's weights, autocast to its own.
                cast = given != widths.compute if widths.narrow else widths.autocast or given != widths.lora
                copies += (widths.compute if widths.autocast else widths.lora) * width * cast
                itself |= not cast
        return copies + given * width * (itself and not kept_already)

    def _lora(self, linear: Linear) -> float:
        """The output of LoRA's matrix A, which B reads."""
        number = self.widths.compute if self.widths.autocast else self.widths.lora
        return number * self.trains.config.lora_rank

    def shifted_heads(self, layer: int) -> float:
        """The share of heads whose groups are shifted."""
        config = self.trains.config
        if config.group_size is None or config.group_size >= config.context_length:
            return 0.0
        return PATTERNS[config.attention].shifted_share_in(layer)

    def _moved_groups(self, layer: int) -> float:
        """Copies of the inputs of shifted heads: whole groups of several sequences are not evenly spaced in memory.

        The operator copies them too where it cannot process rows one by one, and keeps none.
        """
        if self.rows == 1:
            return 0.0
        config, shape = self.trains.config, self.trains.shape
        whole = 1 - (config.group_size or 0) / config.context_length
        moved = shape.query_width + 2 * shape.key_value_width
        return self.widths.compute * moved * self.shifted_heads(layer) * whole
