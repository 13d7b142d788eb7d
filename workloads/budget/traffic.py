"""Bytes that move outside matrix products and attention, and how many kernels are launched.

Norms, activation functions, rotary positions, casts, LoRA's sums, the loss and the optimiser compute little and read
and write much: memory bandwidth bounds them. torch runs each operation by itself, so each reads and writes its
numbers again. The passes below are how often: counted in Llama models, forward and backward, from the inputs and
outputs of every operation. A test recounts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from workloads.budget.activations import FLOAT32, Activations, Widths
from workloads.budget.loop import Loop
from workloads.budget.shape import Linear, ModelShape, Training, what_trains
from workloads.config import GradientCheckpointing, TrainingConfig

# Passes over a number, forward and backward together; about a third of them is the forward pass.
RMS_NORM, TRAINED_NORM, LAYER_NORM = 27, 4, 6
RESIDUAL = 21  # of a layer: sums, and gradients summed from several modules
GATED, NOT_GATED = 14, 5  # inputs and outputs of the activation function
ROTARY, HEADS = 15, 11  # queries and keys: rotated; and otherwise moved
SHIFTED_QUERIES, SHIFTED_KEYS = 16, 24  # by S²-Attn through autograd: parts of heads joined, and their gradients
WRITTEN = 4  # by the operator, in several calls: of queries output and gradient, of keys and values both gradients
LORA_OUTPUT, LORA_INPUT = 7, 3  # of each module that has LoRA matrices
LOSS = 10  # the logits, in float32
FORWARD = 1 / 3
# A cast reads one width and writes another, and its gradient the other way round.
CAST = 2 * (2 + FLOAT32)
# Autocast's copy of a trained weight, its gradient's cast, and the sum with earlier micro-batches.
WEIGHT_COPIES, GRADIENT_SUM = CAST, 3 * FLOAT32
# The gradient's norm, and AdamW, which clips as it reads: weight, gradient and two moments read, all but the gradient
# written.
UPDATE_BYTES = (1 + 7) * FLOAT32

# The share of a layer's bytes left if it is compiled, which fuses operations between products: fitted to this
# package on H200s (Llama-2-7B, LoRA+), 19,310 and 16,295 tokens/s at 8,192 tokens with S² and full attention, 16,316
# and 9,708 at 32,768, within 2%; 14,230 and 13,295 at 98,304 with layers offloaded and recomputed are predicted 2% and
# 3% too slow. A compiled stock model all in bfloat16 reached 14,621; its prediction is too fast.
COMPILED = 0.36

# FP8 products, in addition to the bytes of bfloat16. Compiled: the kernel that makes an operand also writes it as FP8,
# one byte, once for all its readers, and results are scaled where they are read: 27,796
# tokens/s at 8,192 tokens with S² on an H200, all products in FP8, predicted 2% too slow. Else, by operation: absolute
# values, the largest, what they scale, and the cast; two scales and a cast.
FLOAT8_COMPILED = 1
FLOAT8_OPERAND, FLOAT8_RESULT = (2 + 2) + 2 + (2 + 4) + (4 + 1), (2 + 4) + (4 + 4) + (4 + 2)

# Kernels of a layer, forward and backward; more for each RMSNorm, for each module with LoRA matrices, and for heads in
# shifted groups.
LAYER_KERNELS, NORM_KERNELS, LORA_KERNELS, SHIFTED_KERNELS = 89, 23, 11, 50
OPERATOR_KERNELS = 18  # instead of SHIFTED_KERNELS
HEAD_KERNELS = 60  # embeddings, loss and optimiser


@dataclass(frozen=True)
class Traffic:
    """Memory traffic of a model under a configuration."""

    trains: Training
    loop: Loop

    @property
    def widths(self) -> Widths:
        """Bytes of each kind of number."""
        return self.loop.widths

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return self.trains.shape

    def forward(self) -> float:
        """Bytes a token of the forward pass, including the loss."""
        return FORWARD * (sum(count * self.layer(layer) for layer, count in self.trains.kinds) + self.loss())

    @cached_property
    def training(self) -> float:
        """Bytes a token of forward, backward and recomputation."""
        total = self.forward() + (1 - FORWARD) * self.loss()
        for layer, count in self.trains.kinds:
            if layer in self.trains.backward:
                total += count * self.layer(layer) * (1 - FORWARD + FORWARD * (layer in self.trains.checkpointed))
        return total

    def micro_batch(self) -> float:
        """Bytes of one forward and backward pass that do not depend on its tokens: weight copies and gradient sums."""
        return self.trains.linear_weights * WEIGHT_COPIES * self.widths.autocast + self.trains.trainable * GRADIENT_SUM

    def update(self) -> float:
        """Bytes of one optimiser step."""
        return self.trains.trainable * UPDATE_BYTES

    def layer(self, layer: int) -> float:
        """Bytes a token of one layer, forward and backward."""
        shape, compute = self.shape, self.widths.compute
        kept = Activations(self.trains, self.widths)
        residual, trained = kept.residual, self.trains.norms(layer)
        heads = shape.query_width + shape.key_value_width
        moved = shape.norms * self._norm(shape.hidden_size, residual, trained)
        moved += RESIDUAL * residual * shape.hidden_size
        moved += compute * (GATED if shape.gated else NOT_GATED) * shape.intermediate_size
        rotated = heads * shape.rotary / shape.head_dim
        moved += rotated * (ROTARY * residual + CAST * (residual != compute)) + heads * HEADS * compute
        if shape.head_norms:
            moved += self._norm(heads, compute, trained)
        shifted = 2 * kept.shifted_heads(layer)
        if self.loop.one_operator:
            moved += (shifted > 0) * compute * WRITTEN * heads
        else:
            moved += shifted * compute * (SHIFTED_QUERIES * shape.query_width + SHIFTED_KEYS * shape.key_value_width)
        for linear in shape.linears:
            given = kept.norm_output(trained) if linear.reads.endswith("norm") else compute
            if self.widths.autocast and given != compute:
                moved += CAST * linear.inputs
            if linear.name in self.trains.adapted(layer):
                moved += self._lora(linear)
        return moved * (COMPILED if self.loop.compiled else 1) + self._float8(layer)

    def _float8(self, layer: int) -> float:
        if not self.trains.in_float8(layer):
            return 0.0
        able = [linear for linear in self.shape.linears if linear.float8]
        forward = [linear for linear in able if linear.float8_forwards]
        backward = [linear for linear in able if self.trains.needs_gradient(layer, linear.reads)]
        if self.loop.compiled:
            read = {linear.reads: linear.inputs for linear in forward}
            return FLOAT8_COMPILED * (sum(read.values()) + sum(linear.outputs for linear in backward))
        moved = sum(FLOAT8_OPERAND * linear.inputs + FLOAT8_RESULT * linear.outputs for linear in forward)
        return moved + sum(FLOAT8_OPERAND * linear.outputs + FLOAT8_RESULT * linear.inputs for linear in backward)

    def _norm(self, width: int, given: int, trained: bool) -> float:
        if self.shape.norm_biases:
            return FLOAT32 * LAYER_NORM * width
        # A float32 weight's product is cast forward and back, and its gradient once more.
        casts = (given != FLOAT32) + 1.5 * (trained and self.widths.narrow)
        return width * (FLOAT32 * (RMS_NORM + TRAINED_NORM * trained) + CAST * casts)

    def _lora(self, linear: Linear) -> float:
        """PEFT casts a module's input to float32, autocast back to bfloat16, unless it is kept narrow."""
        widths = self.widths
        number = widths.compute if widths.autocast else widths.lora
        casts = CAST * (widths.compute != widths.lora and not widths.narrow) * (1 + widths.autocast)
        return LORA_OUTPUT * number * linear.outputs + (LORA_INPUT * number + casts) * linear.inputs

    def loss(self) -> float:
        """Bytes a token, forward and backward, including the final norm; logits are cast to float32 for it."""
        cast = 4 * self.widths.compute if self.widths.compute != FLOAT32 else 0
        residual = Activations(self.trains, self.widths).residual
        norm = self._norm(self.shape.hidden_size, residual, self.trains.final_norm)
        return (LOSS * FLOAT32 + cast) * self.shape.vocab_size + norm

    @cached_property
    def kernels(self) -> float:
        """Kernels that are launched in a forward and a backward pass."""
        kernels: float = HEAD_KERNELS
        norms = 0 if self.shape.norm_biases else self.shape.norms + 2 * self.shape.head_norms
        for layer, count in self.trains.kinds:
            of_layer = LAYER_KERNELS + NORM_KERNELS * norms + LORA_KERNELS * len(self.trains.adapted(layer))
            shifted = Activations(self.trains, self.widths).shifted_heads(layer) > 0
            of_layer += (OPERATOR_KERNELS if self.loop.one_operator else SHIFTED_KERNELS) * shifted
            kernels += count * of_layer * (1 + FORWARD * (layer in self.trains.checkpointed))
        return kernels


@lru_cache(maxsize=1024)
def traffic(shape: ModelShape, training: TrainingConfig, checkpointing: GradientCheckpointing, loop: Loop) -> Traffic:
    """Returns the :class:`Traffic` of these arguments, made once."""
    return Traffic(what_trains(shape, training, checkpointing), loop)
