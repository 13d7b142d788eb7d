"""Memory of one worker, by parts, at its peak.

The moments of a step (workloads/training/loop.py), each with the tensors that are alive then:

    forward     its end: what all layers kept, autocast's copies of weights that train, logits
    loss        its backward pass: also log-probabilities and two gradients of the logits, in float32; in chunks it
                has all of this for one chunk at a time, already in the forward pass
    last layer  the backward pass of the layer that comes first, all others still kept
    recompute   that of the last layer that recomputes its activations, where later ones have kept theirs
    first layer the one that comes last: all gradients are there
    offload     the forward pass where the copies of an offloaded layer must have left the device but just may not have
    fetch       the backward pass of a layer while an offloaded one comes back
    update      gradients, weights and optimiser state
    evaluation  no gradients; as many tokens as an evaluation forwards, at least a whole window
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
# what is quantised; else two float32 results, one of them scaled.
FLOAT8_COMPILED, FLOAT8_WORK = 1, 2 * FLOAT32

# DeepSpeed under workloads/engines/zero.py: buckets of 50 million float32 numbers; of stage 3's gathered weights up to
# a billion stay (stage3_max_live_parameters).
ZERO_BUCKET = 50_000_000 * FLOAT32
ZERO3_LIVE = 1_000_000_000

# What the allocator does not count: the CUDA context with its libraries (0.5 to 0.6 GiB on A100 and H100), NCCL's
# channels where there are several workers; and a share of what comes and goes, for gaps between blocks. On an H200 (7B,
# LoRA+) torch had reserved 6.4% of that more than it used at 32,768 tokens and 8.1% at 8,192; at 98,304, planned with
# 5%, memory ran out.
CONTEXT_BYTES = int(0.6 * GIB)
NCCL_BYTES = int(1.0 * GIB)
FRAGMENTATION = 0.10


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one worker's device at the worst moment of a trial.

    Args:
        moment: which, see this module.
        weights: frozen ones.
        trained: weights that train (float32: their own masters), with ZeRO also its partition of them.
        casts: autocast's bfloat16 copies of trained weights.
        gradients: those that exist then, and what DDP or ZeRO keep of them.
        optimizer: AdamW's two moments.
        activations: kept for the backward pass.
        logits: and the loss's float32 work on them.
        workspace: gradients between operations, ZeRO's buckets and gathered weights, masks.
        reserve: what torch does not count as allocated: CUDA context, NCCL, gaps between blocks.
        host: bytes in the host's memory that ``offload`` and ``offload_activations`` put there; not part of ``total``.
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
        """What ``torch.cuda.max_memory_allocated`` would say, and a step's ``peak_memory_gib``."""
        return sum(getattr(self, part) for part in self.parts() if part != "reserve")

    @property
    def total(self) -> int:
        """What the device has to have."""
        return self.allocated + self.reserve

    @classmethod
    def parts(cls) -> tuple[str, ...]:
        """The names of the parts that make the total."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in ("moment", "host"))


def memory(
    shape: ModelShape,
    training: TrainingConfig,
    execution: ExecutionConfig,
    workers: int = 1,
    *,
    loop: Loop | None = None,
) -> Memory:
    """Returns the memory of one of ``workers`` workers that train (or, untuned, evaluate) by this configuration.

    Args:
        loop: how training computes; None: as this package does on CPUs.

    Raises:
        InputError: the batch does not divide among the workers, or what trains does not fit the model.
    """
    moments = _Moments(shape, training, execution, workers, loop or Loop.of(shape, training, execution, workers))
    worst = max(moments.all(), key=lambda moment: moment.allocated)
    comes_and_goes = worst.activations + worst.logits + worst.workspace
    reserve = CONTEXT_BYTES + NCCL_BYTES * (workers > 1) + int(FRAGMENTATION * comes_and_goes)
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
    """Returns about what one checkpoint takes on disk: each trained weight and its two moments, in float32.

    Names, shapes and the random state are some kilobytes more. A trial keeps two (workloads/training/checkpoint.py).
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
        # Bytes of the logits that last: a chunk's are gone with it.
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
        """Bytes of what trains, or of its gradients, or of one of its moments; or a share of them."""
        trains, widths = self.trains, self.widths
        others = trains.trainable - trains.lora_parameters
        return int(share * (others * widths.trained + trains.lora_parameters * widths.lora))

    def fixed(self) -> Memory:
        """What is there from the first update to the end."""
        frozen = self.frozen_bytes()
        whole, share, offload = self.trained_bytes(), 1 / self.workers, self.execution.offload
        part = self.trained_bytes(share)
        if self.stage == 0:
            buckets = whole if self.workers > 1 else 0  # DDP's, into which gradients are copied
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
        """What FP8 takes beyond a weight's two bytes in bfloat16, which become two copies of a byte each.

        One byte more, for the backward pass, where the forward pass is in bfloat16.
        """
        once = sum(linear.weights for linear in self.shape.linears if linear.float8 and not linear.float8_forwards)
        return once * sum(map(self.trains.in_float8, range(self.shape.num_layers)))

    def gradients(self) -> int:
        """Of the weights themselves. ZeRO takes each away as it comes, and keeps its own: see :meth:`fixed`."""
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
        """What layers up to one keep of these copies for the backward pass.

        Layers that recompute or are offloaded keep none.
        """
        return self.kept_casts_up_to[up_to]

    @cached_property
    def kept_casts_up_to(self) -> list[int]:
        without = {*self.trains.checkpointed, *self.trains.away}
        layers = range(self.shape.num_layers)
        return list(itertools.accumulate(self.layer_casts(range(i, i + 1)) if i not in without else 0 for i in layers))

    def layers(self, up_to: int) -> float:
        """What the layers up to one keep, bytes a token.

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
        """Bytes of all that a layer keeps where it does not recompute it."""
        return self.tokens * self.kept.layer(layer) + self.layer_casts(range(layer, layer + 1))

    def activations(self) -> float:
        head = self.kept.head()
        if self.chunked:  # in place of the output layer's input its gradient, in full
            head = self.kept.final_norm() + self.kept.residual * self.shape.hidden_size
        return self.tokens * (self.layers(self.shape.num_layers - 1) + head)

    def forward(self, fixed: Memory) -> Memory:
        before = self.logits * self.accumulates  # the logits of the micro-batch before
        return self.add(
            fixed,
            "forward",
            gradients=self.gradients() * self.accumulates,
            casts=self.casts(),
            activations=self.activations(),
            logits=self.logits + before,
        )

    def leaving(self, fixed: Memory, layer: int) -> Memory:
        """The end of a layer's forward pass, with what may still be on its way to the host."""
        on_its_way = sum(
            self.whole(each.layer) for each in self.trains.offloaded if each.layer <= layer < each.released
        )
        return self.add(
            fixed,
            "offload",
            gradients=self.gradients() * self.accumulates,
            casts=self.casts(),
            activations=self.tokens * self.layers(layer) + on_its_way,
            logits=self.logits * self.accumulates,
        )

    def loss(self, fixed: Memory) -> Memory:
        """In chunks, the gradient of an output layer that trains is summed up beside what there is of it."""
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
        """Logits that a loss in chunks has of so many tokens at a time."""
        return min(tokens * self.shape.vocab_size, CHUNK_LOGITS)

    def head_gradient(self) -> int:
        return self.trains.output * self.shape.embedding_parameters * self.widths.trained

    def in_layer(self, fixed: Memory, moment: str, layer: int) -> Memory:
        """The backward pass of a layer: what it and those before it keep, the gradients of those after it."""
        kept, trains = self.kept, self.trains
        again, back = layer in trains.checkpointed, layer in trains.away
        a_token = self.layers(layer)
        if again:  # a float32 input is what its first norm keeps
            a_token += kept.layer(layer) - kept.layer_input * (kept.residual == FLOAT32 and not kept.compiled)
        elif back:
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
            casts=self.kept_casts(layer) + self.layer_casts(range(layer, layer + 1)) * (again or back),
            activations=self.tokens * a_token + coming,
            logits=self.logits,
            workspace=self.tokens * kept.backward_work(layer) + self.for_products(self.tokens, kept.compiled),
        )

    def update(self, fixed: Memory) -> Memory:
        gradients = self.gradients()
        if self.stage:  # joined to one tensor; stage 3 does that for a billion numbers at a time
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
        # As the output layer gives them, in float32, and their log-probabilities.
        logits = self.chunk(tokens) * (widths.compute * (widths.compute < FLOAT32) + 2 * FLOAT32)
        return self.add(
            fixed,
            "evaluation",
            logits=logits,
            workspace=tokens * layer + self.for_products(tokens, compiled=False),
        )

    def for_products(self, tokens: int, compiled: bool) -> int:
        """What a product with a frozen weight takes by itself.

        A 4-bit weight is made whole; what FP8 multiplies has a copy, and the result, where layers are not compiled, is
        scaled in float32.
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
