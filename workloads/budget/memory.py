"""Memory of one worker, by parts, at its peak.

The moments of a step (workloads/training/loop.py), and the tensors alive at each:

    forward      end of the forward pass: activations of all layers, autocast's copies of trained weights, logits
    loss         its backward pass: also log-probabilities and two gradients of the logits, in float32; a loss in chunks
                 has all of this for one chunk at a time, during the forward pass
    last layer   backward pass of the last layer, which runs first: activations of all others are still kept
    recompute    backward pass of the last layer that recomputes, while later ones have kept their activations
    first layer  backward pass of the first layer, which runs last: all gradients exist
    offload      forward pass just before the copies of an offloaded layer must have left the device
    fetch        backward pass of a layer while an offloaded one is copied back
    update       gradients, weights and optimiser state
    evaluation   no gradients; as many tokens as an evaluation forwards, at least a whole window
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property

from workloads.attention.patterns import PATTERNS
from workloads.budget.activations import FLOAT32, Activations
from workloads.budget.loop import CHUNK_LOGITS, Loop
from workloads.budget.shape import ModelShape, what_trains
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.errors import InputError

GIB = 2**30

# NF4: half a byte a weight; an 8-bit scale for each 64 weights, a float32 one for each 256 of these (Dettmers et al.,
# arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + FLOAT32 / (64 * 256)

# Bytes for each number of the widest operand or result of a product in FP8 (workloads/adaptation/float8.py): compiled,
# its quantised copy; else two float32 results, one of them scaled.
FLOAT8_COMPILED, FLOAT8_WORK = 1, 2 * FLOAT32

# DeepSpeed under workloads/engines/zero.py: buckets of 50 million float32 numbers; stage 3 keeps up to a billion
# gathered weights (stage3_max_live_parameters).
ZERO_BUCKET = 50_000_000 * FLOAT32
ZERO3_LIVE = 1_000_000_000

# What the allocator does not count: the CUDA context with its libraries (0.5 to 0.6 GiB on A100 and H100), NCCL's
# channels between workers, and a share of temporary memory for gaps between blocks. On an H200 (7B, LoRA+) torch
# reserved 6.4% of it beyond its use at 32,768 tokens and 8.1% at 8,192; at 98,304, planned with 5%, memory ran out.
CONTEXT_BYTES = int(0.6 * GIB)
NCCL_BYTES = int(1.0 * GIB)
FRAGMENTATION = 0.10


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one worker's device at the worst moment of a trial.

    Args:
        moment: one of those listed above.
        weights: frozen weights.
        trained: weights that train, in float32; with ZeRO also its partition of them.
        casts: autocast's bfloat16 copies of trained weights.
        gradients: those that exist at the moment, and the copies of DDP or ZeRO.
        optimizer: AdamW's two moments.
        activations: kept for the backward pass.
        logits: with the loss's float32 copies of them.
        workspace: gradients between operations, ZeRO's buckets and gathered weights, masks.
        reserve: what torch does not count as allocated: CUDA context, NCCL, gaps between blocks.
        host: bytes in host memory, from ``offload`` and ``offload_activations``; not part of ``total``.
    """

    moment: str
    weights: int = 0
    trained: int = 0
    casts: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    workspace: int = 0
    reserve: int = 0
    host: int = 0

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` and a step's ``peak_memory_gib`` report."""
        return sum(getattr(self, part) for part in self.parts() if part != "reserve")

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.allocated + self.reserve

    @classmethod
    def parts(cls) -> tuple[str, ...]:
        """The names of the parts of the total."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in ("moment", "host"))


def memory(
    shape: ModelShape,
    training: TrainingConfig,
    execution: ExecutionConfig,
    workers: int = 1,
    *,
    loop: Loop | None = None,
) -> Memory:
    """Returns the memory of one of ``workers`` workers that train (or, untuned, evaluate) with this configuration.

    Args:
        loop: how training computes; None: as this package does on CPUs.

    Raises:
        InputError: the batch does not divide among the workers, or what trains does not fit the model.
    """
    moments = _Moments(shape, training, execution, workers, loop or Loop.of(shape, training, execution, workers))
    worst = max(moments.all(), key=lambda moment: moment.allocated)
    temporary = worst.activations + worst.logits + worst.workspace
    reserve = CONTEXT_BYTES + NCCL_BYTES * (workers > 1) + int(FRAGMENTATION * temporary)
    return dataclasses.replace(worst, reserve=reserve)


def micro_batch(training: TrainingConfig, execution: ExecutionConfig, workers: int) -> int:
    """Returns the sequences in one forward pass of one worker.

    Raises:
        InputError: the batch does not divide among the workers.
    """
    if training.steps and training.batch % workers:
        raise InputError(f"a batch of {training.batch} sequences does not divide among {workers} workers")
    share = max(1, training.batch // workers)
    return min(execution.micro_batch or share, share)


def checkpoint_bytes(shape: ModelShape, training: TrainingConfig) -> int:
    """Returns the approximate size of a checkpoint on disk: each trained weight and its two moments, in float32.

    Names, shapes and the random state add some kilobytes. A trial keeps two (workloads/training/checkpoint.py).
    """
    return 3 * FLOAT32 * what_trains(shape, training).trainable


class _Moments:
    def __init__(
        self, shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, loop: Loop
    ) -> None:
        self.shape, self.training, self.execution, self.workers = shape, training, execution, workers
        self.widths, self.chunked = loop.widths, loop.chunked_loss
        self.trains = what_trains(shape, training, execution.gradient_checkpointing, execution.layers_offloaded)
        self.rows = micro_batch(training, execution, workers)
        self.tokens = self.rows * training.context_length
        self.accumulates = training.batch > self.rows * workers
        masked = execution.attention_backend == "sdpa" and not PATTERNS[training.attention].is_grouped
        self.kept = Activations(self.trains, loop.widths, self.rows, masked, loop.compiled, loop.one_operator)
        self.stage = int(execution.engine[-1]) if execution.engine.startswith("zero") else 0
        # Bytes of logits that outlive their chunk.
        self.logits = 0 if self.chunked else self.tokens * shape.vocab_size * loop.widths.compute

    def all(self) -> list[Memory]:
        fixed = self.fixed()
        moments = [self.evaluation(fixed)]
        if self.trains.trainable and self.training.steps:
            away = sum(self.whole(each.layer) for each in self.trains.offloaded)
            fixed = dataclasses.replace(fixed, host=fixed.host + int(away))
            moments += [self.forward(fixed), self.loss(fixed), self.update(fixed)]
            moments.append(self.in_layer(fixed, "last layer", self.shape.num_layers - 1))
            if checkpointed := self.trains.checkpointed:
                moments.append(self.in_layer(fixed, "recompute", checkpointed[-1]))
            moments.append(self.in_layer(fixed, "first layer", self.trains.backward[0]))
            for each in self.trains.offloaded:
                moments += [self.leaving(fixed, each.released - 1), self.in_layer(fixed, "fetch", each.fetched)]
        return moments

    def trained_bytes(self, share: float = 1.0) -> int:
        """Bytes of the trained weights, of their gradients, or of one of their moments; or a share of these."""
        trains, widths = self.trains, self.widths
        others = trains.trainable - trains.lora_parameters
        return int(share * (others * widths.trained + trains.lora_parameters * widths.lora))

    def fixed(self) -> Memory:
        """Memory allocated from the first update to the end."""
        frozen = self.frozen_bytes()
        whole, share, offload = self.trained_bytes(), 1 / self.workers, self.execution.offload
        part = self.trained_bytes(share)
        if self.stage == 0:
            buckets = whole if self.workers > 1 else 0  # of DDP, which copies gradients into them
            return Memory(moment="", weights=frozen, trained=whole, optimizer=2 * whole, gradients=buckets)
        # ZeRO updates a copy of its partition, and keeps the partition's gradients.
        on_host = 4 * part if offload else 0
        updates = dict(trained=part, optimizer=2 * part, gradients=part) if not offload else dict(trained=0)
        bucket = 2 * ZERO_BUCKET if self.workers > 1 else ZERO_BUCKET
        if self.stage == 2:
            updates["trained"] += whole
            return Memory(moment="", weights=frozen, workspace=bucket, host=on_host, **updates)
        parameters = self.trains.parameters
        live = int(min(parameters, ZERO3_LIVE) / parameters * (frozen + whole))
        if offload:
            return Memory(moment="", workspace=bucket + live, host=on_host + int(share * frozen) + part, **updates)
        updates["trained"] += part
        return Memory(moment="", weights=int(share * frozen), workspace=bucket + live, **updates)

    def frozen_bytes(self) -> int:
        frozen, shape = self.trains.frozen, self.shape
        if self.training.quantization != "nf4":
            return frozen * self.widths.frozen + self._float8_copies()
        quantized = shape.num_layers * shape.layer_weights
        return int(quantized * NF4_BYTES) + (frozen - quantized) * self.widths.frozen

    def _float8_copies(self) -> int:
        """Bytes beyond a weight's two in bfloat16, which FP8 replaces by two copies of one byte.

        A weight whose forward pass is in bfloat16 takes one byte more, for the backward pass.
        """
        once = sum(linear.weights for linear in self.shape.linears if linear.float8 and not linear.float8_forwards)
        return once * sum(map(self.trains.in_float8, range(self.shape.num_layers)))

    def gradients(self) -> int:
        """Bytes of the weights' own gradients. ZeRO frees each at once and keeps its copies: see :meth:`fixed`."""
        if not self.stage:
            return self.trained_bytes()
        of_linears = max(linear.weights for linear in self.shape.linears) if self.training.method == "full" else 0
        return max(of_linears, self.trains.embeddings * self.shape.embedding_parameters) * self.widths.trained

    def casts(self) -> int:
        """Autocast's copies of all trained weights of linear modules."""
        return self.trains.linear_weights * self.widths.compute * self.widths.autocast

    def head_cast(self) -> int:
        """Autocast's copy of the output layer's weight, if it trains."""
        return self.trains.output * self.shape.embedding_parameters * self.widths.compute * self.widths.autocast

    def layer_casts(self, layers: range) -> int:
        """Autocast's copies of the weights that train in these layers."""
        return self.trained_in(layers) * self.widths.compute * self.widths.autocast

    def trained_in(self, layers: range) -> int:
        return sum(map(self.trains.weights, layers)) * self.shape.layer_weights

    def kept_casts(self, up_to: int) -> int:
        """The copies that layers up to this one keep for the backward pass.

        Layers that recompute or are offloaded keep none.
        """
        return self.kept_casts_up_to[up_to]

    @cached_property
    def kept_casts_up_to(self) -> list[int]:
        without = {*self.trains.checkpointed, *self.trains.away}
        layers = range(self.shape.num_layers)
        return list(itertools.accumulate(self.layer_casts(range(i, i + 1)) if i not in without else 0 for i in layers))

    def layers(self, up_to: int) -> float:
        """What the layers up to this one keep, in bytes a token.

        A layer that recomputes keeps its input, an offloaded one nothing.
        """
        return self.kept_up_to[up_to]

    @cached_property
    def kept_up_to(self) -> list[float]:
        kept = [0.0] * self.shape.num_layers
        for alike in self.trains.alike:
            if alike[0] in self.trains.away:
                continue
            a_layer = self.kept.layer_input if alike[0] in self.trains.checkpointed else self.kept.layer(alike[0])
            for layer in alike:
                kept[layer] = a_layer
        return list(itertools.accumulate(kept))

    def whole(self, layer: int) -> float:
        """Bytes that a layer keeps if it does not recompute."""
        return self.tokens * self.kept.layer(layer) + self.layer_casts(range(layer, layer + 1))

    def activations(self) -> float:
        head = self.kept.head()
        if self.chunked:  # the whole gradient of the output layer's input replaces the input
            head = self.kept.final_norm() + self.kept.residual * self.shape.hidden_size
        return self.tokens * (self.layers(self.shape.num_layers - 1) + head)

    def forward(self, fixed: Memory) -> Memory:
        before = self.logits * self.accumulates  # the previous micro-batch's logits
        return self.add(
            fixed,
            "forward",
            gradients=self.gradients() * self.accumulates,
            casts=self.casts(),
            activations=self.activations(),
            logits=self.logits + before,
        )

    def leaving(self, fixed: Memory, layer: int) -> Memory:
        """The end of a layer's forward pass, with activations that may still be being copied to the host."""
        leaving = sum(self.whole(each.layer) for each in self.trains.offloaded if each.layer <= layer < each.released)
        return self.add(
            fixed,
            "offload",
            gradients=self.gradients() * self.accumulates,
            casts=self.casts(),
            activations=self.tokens * self.layers(layer) + leaving,
            logits=self.logits * self.accumulates,
        )

    def loss(self, fixed: Memory) -> Memory:
        """In chunks, the gradient of an output layer that trains is summed in a second tensor."""
        if self.chunked:
            logits = self.chunk(self.tokens) * (3 * FLOAT32 + self.widths.compute)
        else:
            logits = self.logits + self.tokens * self.shape.vocab_size * 3 * FLOAT32
        return self.add(
            fixed,
            "loss",
            gradients=self.gradients() * self.accumulates + self.head_gradient() * self.chunked,
            casts=self.casts() if self.chunked else self.head_cast() + self.kept_casts(self.shape.num_layers - 1),
            activations=self.activations(),
            logits=logits,
        )

    def chunk(self, tokens: int) -> int:
        """Logits that a loss in chunks holds at a time, of this many tokens."""
        return min(tokens * self.shape.vocab_size, CHUNK_LOGITS)

    def head_gradient(self) -> int:
        return self.trains.output * self.shape.embedding_parameters * self.widths.trained

    def in_layer(self, fixed: Memory, moment: str, layer: int) -> Memory:
        """The backward pass of a layer: activations up to this layer, and gradients of the later ones."""
        kept, trains = self.kept, self.trains
        recomputes, returns = layer in trains.checkpointed, layer in trains.away
        a_token = self.layers(layer)
        if recomputes:  # its first norm keeps a float32 input itself
            a_token += kept.layer(layer) - kept.layer_input * (kept.residual == FLOAT32 and not kept.compiled)
        elif returns:
            a_token += kept.layer(layer)
        coming = sum(self.whole(each.layer) for each in trains.offloaded if each.layer < layer <= each.fetched)
        gradients = self.gradients()
        if not self.accumulates and not self.stage:
            to_come = trains.embeddings * self.shape.embedding_parameters + self.trained_in(range(layer + 1))
            gradients = max(self.head_gradient(), gradients - to_come * self.widths.trained)
        return self.add(
            fixed,
            moment,
            gradients=gradients,
            casts=self.kept_casts(layer) + self.layer_casts(range(layer, layer + 1)) * (recomputes or returns),
            activations=self.tokens * a_token + coming,
            logits=self.logits,
            workspace=self.tokens * kept.backward_work(layer) + self.for_products(self.tokens, kept.compiled),
        )

    def update(self, fixed: Memory) -> Memory:
        gradients = self.gradients()
        if self.stage:  # joined in one tensor; stage 3 joins a billion numbers at a time
            partition = self.trained_bytes(1 / self.workers)
            gradients = min(partition, FLOAT32 * ZERO3_LIVE) if self.stage == 3 else partition
            gradients *= not self.execution.offload
        return self.add(fixed, "update", gradients=gradients, logits=self.logits)

    def evaluation(self, fixed: Memory) -> Memory:
        training, shape, widths = self.training, self.shape, self.widths
        tokens = max(training.context_length, self.execution.eval_batch_tokens)
        if training.method == "untuned":
            fixed = dataclasses.replace(fixed, gradients=0, optimizer=0)
        inner = 3 if shape.gated else 2
        layer = widths.compute * inner * shape.intermediate_size + 3 * self.kept.residual * shape.hidden_size
        # Logits in the output layer's type and in float32, and their log-probabilities.
        logits = self.chunk(tokens) * (widths.compute * (widths.compute < FLOAT32) + 2 * FLOAT32)
        return self.add(
            fixed,
            "evaluation",
            logits=logits,
            workspace=tokens * layer + self.for_products(tokens, compiled=False),
        )

    def for_products(self, tokens: int, compiled: bool) -> int:
        """What a single product with a frozen weight allocates.

        A 4-bit weight is dequantised; FP8 multiplies quantised copies, and scales the result in float32 where layers
        are not compiled.
        """
        match self.training.quantization:
            case "none":
                return 0
            case "nf4":
                return max(linear.weights for linear in self.shape.linears) * self.widths.compute
            case "fp8":
                widest = max(max(linear.inputs, linear.outputs) for linear in self.shape.linears if linear.float8)
                return tokens * widest * (FLOAT8_COMPILED if compiled else FLOAT8_WORK)

    @staticmethod
    def add(fixed: Memory, moment: str, **parts: float) -> Memory:
        sums = {part: getattr(fixed, part) + int(size) for part, size in parts.items()}
        return dataclasses.replace(fixed, moment=moment, **sums)
