"""Floating-point operations: of attention patterns, of a forward pass, of a training step; in closed form.

A multiplication with its addition is 2 FLOPs. Two ways to count attention:

    causally   only the pairs (query, key) that attend: a kernel that skips the rest
    dense      every pair inside a group, including those above the diagonal: the LongLoRA paper's table (v3 table 11)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from workloads.attention.patterns import PATTERNS
from workloads.budget.shape import Linear, ModelShape, Training, what_trains
from workloads.config import Attention, GradientCheckpointing, TrainingConfig
from workloads.models.families import ATTENTION

# The matrix products of attention: two forward (scores, output); backward four, and the scores once more, which a
# fused kernel does not keep (Dao, arXiv 2205.14135).
BACKWARD_BY_FORWARD, RECOMPUTED_SCORES = 2.0, 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperFlops:
    """One row of the paper's FLOP table, in FLOPs."""

    attention: float
    projections: float
    mlp: float
    others: float

    @property
    def total(self) -> float:
        """The row's sum."""
        return self.attention + self.projections + self.mlp + self.others


def paper_flops(shape: ModelShape, tokens: int, group_size: int | None = None) -> PaperFlops:
    """The forward pass of one sequence as LongLoRA's table 11 (v1: table 7) counts it, with torchprofile.

    Attention is dense: ``tokens`` x ``tokens`` pairs, or with S²-Attn ``tokens`` x ``group_size``. Elementwise
    multiplications are counted as 2 FLOPs too: of the gate in the MLP; of norms (two each) and of rotary positions in
    the others, with the output layer. This reproduces every printed digit; the printed totals are sums of the
    rounded entries.
    """
    layers, width = shape.num_layers, shape.query_width
    projections = sum(linear.weights for linear in shape.linears if linear.reads in ATTENTION)
    mlp = sum(linear.weights for linear in shape.linears if linear.reads not in ATTENTION)
    rotary = 2 * shape.rotary * (shape.num_heads + shape.num_key_value_heads)
    norms = 2 * shape.hidden_size * (layers * shape.norms + 1)
    return PaperFlops(
        attention=4.0 * tokens * (group_size or tokens) * width * layers,
        projections=2.0 * tokens * projections * layers,
        mlp=2.0 * tokens * layers * (mlp + shape.gated * shape.intermediate_size),
        others=2.0 * tokens * (shape.embedding_parameters + norms + layers * rotary),
    )


@lru_cache(maxsize=4096)
def attended_pairs(attention: Attention, group_size: int | None, num_heads: int, tokens: int, layer: int = 0) -> int:
    """Returns how many (query, key) pairs attend, over all heads of a layer, in a sequence without padding.

    The sum of :func:`workloads.attention.masks.dense_mask` in closed form. It ignores documents: if
    attention stops at their boundaries, fewer pairs attend.
    """
    return PATTERNS[attention].attended_pairs(tokens, group_size or tokens, num_heads, layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """FLOPs of some tokens, attention counted causally.

    ``linear`` is every matrix product with a weight, including LoRA's and the output layer's; ``float8`` is how many of
    these are in FP8; ``recomputed`` is what gradient checkpointing repeats.
    """

    forward_linear: float
    forward_attention: float
    backward_linear: float = 0.0
    backward_attention: float = 0.0
    recomputed_linear: float = 0.0
    recomputed_attention: float = 0.0
    float8: float = 0.0

    @property
    def linear(self) -> float:
        """FLOPs of matrix products with weights, forward, backward and recomputed."""
        return self.forward_linear + self.backward_linear + self.recomputed_linear

    @property
    def attention(self) -> float:
        """FLOPs of attention's own products, forward, backward and recomputed."""
        return self.forward_attention + self.backward_attention + self.recomputed_attention

    @property
    def total(self) -> float:
        """All FLOPs of the device, including the scores that attention's backward kernel recomputes."""
        return self.linear + self.attention

    @property
    def model(self) -> float:
        """The FLOPs that model FLOPs utilisation counts (Chowdhery et al., arXiv 2204.02311).

        It leaves out recomputation, by checkpointing or inside the attention kernel.
        """
        once = BACKWARD_BY_FORWARD / (BACKWARD_BY_FORWARD + RECOMPUTED_SCORES)
        forward = self.forward_linear + self.forward_attention
        return forward + self.backward_linear + once * self.backward_attention

    def __mul__(self, times: float) -> Flops:
        return Flops(**{name: getattr(self, name) * times for name in self.__slots__})


def forward_flops(shape: ModelShape, tokens: int, training: TrainingConfig | None = None) -> Flops:
    """Returns the forward pass of one sequence of ``tokens`` tokens with full attention, as in evaluation.

    Includes the modules that ``training`` adds to the model (LoRA).
    """
    trains = what_trains(shape, training) if training else None
    lora = trains.lora_parameters if trains else 0
    weights = shape.num_layers * shape.layer_weights + shape.embedding_parameters + lora
    pairs = shape.num_layers * attended_pairs("full", None, shape.num_heads, tokens)
    float8 = sum(map(trains.in_float8, range(shape.num_layers))) if trains else 0
    return Flops(
        forward_linear=2.0 * tokens * weights,
        forward_attention=4.0 * shape.head_dim * pairs,
        float8=2.0 * tokens * float8 * sum(linear.weights * linear.float8_forwards for linear in shape.linears),
    )


@lru_cache(maxsize=4096)
def training_flops(
    shape: ModelShape, training: TrainingConfig, gradient_checkpointing: GradientCheckpointing = 0
) -> Flops:
    """Forward and backward of one training sequence.

    A weight costs 2 FLOPs a token forward, 2 for the gradient of its input where something before it trains, and 2 for
    its own gradient if it trains: 4N for frozen weights, 6N for trained ones. Layers before the first that trains have
    no backward pass. A layer with gradient checkpointing is recomputed except its last linear module: torch stops
    early.
    """
    trains = what_trains(shape, training, gradient_checkpointing)
    tokens = training.context_length
    linear, attention, float8 = _Passes(), _Passes(), _Passes()
    for layer, count in trains.kinds:
        pairs = attended_pairs(training.attention, training.group_size, shape.num_heads, tokens, layer)
        again = layer in trains.checkpointed
        attention.forward += count * pairs
        attention.backward += count * pairs * trains.needs_gradient(layer, "attention")
        attention.recomputed += count * pairs * again
        for each in shape.linears:
            linear.forward += count * _forward_weights(trains, layer, each)
            linear.backward += count * _backward_weights(trains, layer, each)
            linear.recomputed += count * again * _forward_weights(trains, layer, each)
            if trains.in_float8(layer):
                weights = count * each.weights
                float8.forward += weights * each.float8_forwards * (1 + again)
                float8.backward += weights * each.float8 * trains.needs_gradient(layer, each.reads)
        linear.recomputed -= count * again * _not_recomputed(trains, layer)
    head = shape.embedding_parameters
    linear.forward += head
    linear.backward += head * (trains.trainable > 0) + head * trains.output
    a_weight, a_pair = 2.0 * tokens, 4.0 * shape.head_dim
    return Flops(
        forward_linear=a_weight * linear.forward,
        forward_attention=a_pair * attention.forward,
        backward_linear=a_weight * linear.backward,
        backward_attention=a_pair * attention.backward * (BACKWARD_BY_FORWARD + RECOMPUTED_SCORES),
        recomputed_linear=a_weight * linear.recomputed,
        recomputed_attention=a_pair * attention.recomputed,
        float8=a_weight * (float8.forward + float8.backward),
    )


@dataclass
class _Passes:
    """Weights (or pairs) times how often each is multiplied by a token."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0


def _lora_sides(trains: Training, layer: int, linear: Linear) -> tuple[int, int]:
    """Weights of LoRA's matrices A and B, zero without them."""
    rank = trains.config.lora_rank * (linear.name in trains.adapted(layer))
    return rank * linear.inputs, rank * linear.outputs


def _forward_weights(trains: Training, layer: int, linear: Linear) -> int:
    return linear.weights + sum(_lora_sides(trains, layer, linear))


def _backward_weights(trains: Training, layer: int, linear: Linear) -> int:
    a, b = _lora_sides(trains, layer, linear)
    to_input = (linear.weights + a) * trains.needs_gradient(layer, linear.reads)
    return to_input + linear.weights * trains.weights(layer) + a + 2 * b


def _not_recomputed(trains: Training, layer: int) -> int:
    """Weights at a layer's end whose products checkpointing does not repeat.

    It stops before the last product of a layer that has a backward pass, since that does not need its result; a norm
    after it does (Gemma 2 and 3). In GPT-NeoX the MLP may have none while attention trains beside it. With LoRA
    matrices a module computes its products before it keeps what it needs (workloads/adaptation/lora_fusion.py).
    """
    if trains.shape.norms == 4:
        return 0
    after = 0
    for each in reversed(trains.shape.linears):
        if _backward_weights(trains, layer, each):
            return after + each.weights * (each.name not in trains.adapted(layer))
        after += _forward_weights(trains, layer, each)
    return after
