"""One trial's training loop, from a loaded model to its last evaluation, in plain PyTorch.

What happens is told through ``emit(event, **fields)``, one call an event; whoever runs the trial writes them down.
The events and their fields:

    model    parameters, trainable_parameters, attention_backend, compiled_layers (whether)
    resume   step: training goes on from this checkpoint
    eval     step, tokens, context_length, perplexity, nll and num_tokens (a list each, one entry a document)
    step     step, tokens, loss, learning_rate, grad_norm, seconds, tokens_per_second, peak_memory_gib,
             mfu (on a GPU that workloads/budget/devices.py knows)
    saved    step
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from workloads.adaptation.float8 import quantise_base
from workloads.adaptation.methods import (
    adapt,
    compute_dtype,
    count_parameters,
    keep_autocast_dtype,
    trainable_parameters,
)
from workloads.attention.documents import document_ids
from workloads.attention.interface import backend_of, use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.budget import Device, ModelShape, model_flops_utilisation
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import Batch, ExampleCorpus, PackedCorpus
from workloads.engines.engine import Awaited, Engine
from workloads.errors import InputError
from workloads.evaluation.answers import score_answers, to_device
from workloads.evaluation.bootstrap import DocumentScores
from workloads.evaluation.perplexity import score_documents
from workloads.models.positions import original_context_length
from workloads.models.quantization import nf4_loading
from workloads.models.source import ModelSource
from workloads.training.checkpoint import load_checkpoint, newest_step, save_checkpoint
from workloads.training.compilation import compile_layers, layers_compile, uncompiled
from workloads.training.offload import layers_to_offload, offload_activations
from workloads.training.optimization import build_optimizer, set_learning_rate
from workloads.training.recompute import recompute_activations

Emit = Callable[..., None]
# What whoever runs a trial may ask of it between two steps: to write a checkpoint, or to end there with one.
Asked = Literal["save", "stop"]


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient became NaN or infinite."""


def build_model(source: ModelSource, config: TrainingConfig, engine: Engine, execution: ExecutionConfig) -> nn.Module:
    """The model of a trial, on its device, with its positions, its attention pattern and what trains."""
    torch.manual_seed(config.seed)  # LoRA's A matrices are random
    dtype = compute_dtype(config.precision)
    quantized = nf4_loading(engine.device, dtype) if config.quantization == "nf4" else None
    model = source.load(config.context_length, config.positions, dtype, quantized, engine.home)
    return set_up(model, config, engine, execution)


def set_up(model: nn.Module, config: TrainingConfig, engine: Engine, execution: ExecutionConfig) -> nn.Module:
    """A loaded model as a trial trains it: its attention pattern, what trains, FP8, checkpointing, its device."""
    pattern = AttentionPattern(name=config.attention, group_size=config.group_size)
    use_pattern(
        model,
        pattern,
        execution.attention_backend,
        device=engine.device,
        dtype=engine.dtype,
        documents=config.document_mask,
    )
    model = adapt(
        model,
        config.method,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
        train_layers=config.train_layers,
    )
    if config.quantization == "fp8":
        quantise_base(model, engine.device)
    if config.method.startswith("lora"):
        from workloads.adaptation.lora_fusion import (
            spare_passes,  # it imports PEFT, which takes a second that others can do without
        )

        spare_passes(model)
    keep_autocast_dtype(model)
    offloaded = layers_to_offload(model, execution.layers_offloaded)
    recompute_activations(model, execution.gradient_checkpointing, besides=offloaded)
    offload_activations(model, execution.layers_offloaded, engine.device)
    return engine.place(model)


def run(
    source: ModelSource,
    config: TrainingConfig,
    execution: ExecutionConfig,
    corpus: PackedCorpus | ExampleCorpus,
    checkpoints: Path,
    engine: Engine,
    emit: Emit,
    untuned: DocumentScores | None = None,
    asked: Callable[[], Asked | None] = lambda: None,
) -> bool:
    """Trains and evaluates one trial, from its newest checkpoint if it has one. Returns whether it came to its end.

    Args:
        untuned: what the model scores at step 0, if an untuned trial with the same positions has shown it already.
        asked: called after each step, its evaluation and its checkpoint, on worker 0 alone.

    Raises:
        InputError: the batch does not divide among the workers, or the model cannot be trained as asked.
        NonFiniteLoss: in the step it happens.
    """
    if config.steps and config.batch % engine.num_workers:
        raise InputError(f"a batch of {config.batch} sequences does not divide among {engine.num_workers} workers")
    if config.quantization != "none" and execution.engine == "zero3":
        raise InputError(
            f"quantization {config.quantization} with the engine zero3, which cannot share out quantised weights; "
            "choose the engine zero2 or ddp"
        )
    model = build_model(source, config, engine, execution)
    total, trainable = count_parameters(model)
    emit(
        "model",
        parameters=total,
        trainable_parameters=trainable,
        attention_backend=backend_of(model),
        compiled_layers=layers_compile(model, config, execution, engine),
    )
    return Trial(model, config, execution, corpus, checkpoints, engine, emit, untuned, asked).run()


@dataclass(frozen=True)
class StepUnderWay:
    """A step that the device has been given: what is known of it before it is done.

    Args:
        step, tokens: counted from the trial's begin, this step included.
        batch_tokens: of this step alone.
        numbers: its loss and the norm of its gradient.
        started: on the clock of ``time.perf_counter``.
    """

    step: int
    tokens: int
    batch_tokens: int
    learning_rate: float
    numbers: Awaited
    started: float


@dataclass
class Trial:
    """The loop over steps, with what it needs between them."""

    model: nn.Module
    config: TrainingConfig
    execution: ExecutionConfig
    corpus: PackedCorpus | ExampleCorpus
    checkpoints: Path
    engine: Engine
    emit: Emit
    untuned: DocumentScores | None = None
    asked: Callable[[], Asked | None] = lambda: None
    step: int = 0
    prepared: Batch | None = None  # the next step's, made while the device works
    under_way: StepUnderWay | None = None  # the last step, until it is told of
    finished_at: float = -math.inf  # when the one before was done, on the clock of perf_counter
    best: dict[str, float] | None = None  # step and perplexity of the best evaluation so far, at the trained length

    def __post_init__(self) -> None:
        self.original_length = original_context_length(self.model.config)
        self.saved_at = time.monotonic()

    def run(self) -> bool:
        if self.config.steps == 0:
            self.engine.prepare(self.model)
            self.evaluate(at_original_length=True)
            return True
        self.parameters = trainable_parameters(self.model)
        self.optimizer = build_optimizer(self.model, self.config)
        training_model = self.start()
        training_model.train()
        if self.step == 0:
            self.evaluate(at_original_length=False)
        while self.step < self.config.steps:
            self.train_step(training_model)
            last = self.step == self.config.steps
            if last or self.step % self.config.eval_every == 0:
                self.evaluate(at_original_length=last)
            saved = last or self.is_checkpoint_step()
            if saved:
                self.save()
            asked = None if last else self.what_is_asked()
            if asked and not saved:
                self.save()
            if asked == "stop":
                return False
        return True

    def is_checkpoint_step(self) -> bool:
        execution = self.execution
        periods = [execution.checkpoint_every, *([execution.keep_every] if execution.keep_every else [])]
        is_best = execution.keep_best and self.best is not None and self.best["step"] == self.step
        return is_best or any(self.step % period == 0 for period in periods)

    def what_is_asked(self) -> Asked | None:
        """What worker 0 is asked, or by its clock has to do, for all."""
        answers = (None, "save", "stop")
        first = answers.index(self.asked() or self.what_is_due()) if self.engine.rank == 0 else 0
        return answers[int(self.engine.sum(torch.tensor(first)))]

    def what_is_due(self) -> Asked | None:
        minutes = (time.monotonic() - self.saved_at) / 60
        return "save" if minutes >= self.execution.checkpoint_minutes else None

    def train_step(self, training_model: nn.Module) -> None:
        """Gives the device a step, and tells of it once it is done: at once, or, where the engine runs ahead, when the
        next one has been given to it or :meth:`finish_step` is called.
        """
        config, engine = self.config, self.engine
        started = time.perf_counter()
        set_learning_rate(self.optimizer, config, self.step)
        batch = self.prepared or self.train_batch(self.step)
        mine = batch.rows(slice(engine.rank, None, engine.num_workers))
        loss_sum = torch.zeros((), device=engine.device)
        pieces = mine.split(self.execution.micro_batch or len(mine))
        for index, piece in enumerate(pieces):
            tokens, scored, mask = to_device(piece, engine.device)
            # The mean over all scored tokens of the batch, wherever they are: not of the workers' or the
            # micro-batches' means, in which a token would count more where there are fewer.
            weights = scored / batch.num_scored
            with engine.accumulate(training_model, last=index == len(pieces) - 1):
                with engine.autocast():
                    loss = training_model(tokens, weights, attention_mask=mask, **self.boundaries(tokens))
                engine.backward(loss)
            loss_sum += loss.detach()
        numbers = engine.update(loss_sum)
        self.step += 1
        # While the device works: what it gets next.
        self.prepared = self.train_batch(self.step) if self.step < config.steps else None
        self.finish_step()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.under_way = StepUnderWay(self.step, self.tokens, batch.num_tokens, learning_rate, numbers, started)
        if not engine.runs_ahead:
            self.finish_step()

    def finish_step(self) -> None:
        """Waits for the step that is under way, if there is one, and tells of it.

        Raises:
            NonFiniteLoss: it, and whatever was begun since, has updated nothing.
        """
        if self.under_way is None:
            return
        step, self.under_way = self.under_way, None
        # Every worker knows the same loss and the same norm, so all stop here or none does.
        loss, grad_norm = step.numbers.read()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(
                f"step {step.step}: loss {loss}, gradient norm {grad_norm}; nothing was updated. "
                "Lower the learning rate, or train in float32"
            )
        now = time.perf_counter()
        seconds = now - max(step.started, self.finished_at)
        self.finished_at = now
        tokens_per_second = step.batch_tokens / seconds
        self.emit(
            "step",
            step=step.step,
            tokens=step.tokens,
            loss=loss,
            learning_rate=step.learning_rate,
            grad_norm=grad_norm,
            seconds=seconds,
            tokens_per_second=tokens_per_second,
            peak_memory_gib=self.engine.peak_memory_gib(),
            **self.utilisation(tokens_per_second),
        )

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOPs utilisation, where the device's peak is known; not of examples, whose lengths differ."""
        device = Device.named(self.engine.device_name())
        if device is None or self.config.task == "sft":
            return {}
        shape = ModelShape.of(self.model.config)
        a_worker = tokens_per_second / self.engine.num_workers
        return {"mfu": model_flops_utilisation(shape, self.config, a_worker, device)}

    def train_batch(self, step: int) -> Batch:
        """The sequences of the step after ``step`` steps, of all workers."""
        config = self.config
        where = (step, config.batch, config.context_length, config.seed)
        if config.task == "sft":
            return self.corpus.train_batch(*where, config.long_examples)
        return Batch.whole(self.corpus.train_batch(*where))

    def boundaries(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model's call is told of documents, if attention is to stop at their boundaries."""
        return {"document_ids": document_ids(tokens, self.corpus.eos_token_id)} if self.config.document_mask else {}

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, over all workers, without padding."""
        config = self.config
        if config.task == "sft" and config.steps:
            where = (self.step, config.batch, config.context_length, config.seed)
            return self.corpus.tokens_before(*where, config.long_examples)
        return self.step * config.batch * config.context_length

    def evaluate(self, at_original_length: bool) -> None:
        """Scores what is held out at the trained length, and on request at the model's original one too."""
        self.finish_step()
        lengths = [self.config.context_length]
        if at_original_length and self.original_length not in lengths and self.can_evaluate(self.original_length):
            lengths.append(self.original_length)
        for length in lengths:
            if self.step == 0 and self.untuned is not None and length == self.config.context_length:
                scores = self.untuned
            else:
                scores = self.score(length)
            if length == self.config.context_length:
                self.note_best(scores.perplexity)
            self.emit(
                "eval",
                step=self.step,
                tokens=self.tokens,
                context_length=length,
                perplexity=scores.perplexity,
                nll=scores.nll.tolist(),
                num_tokens=scores.tokens.tolist(),
            )

    def score(self, length: int) -> DocumentScores:
        """What is held out, scored in windows, or whole examples, of up to ``length`` tokens."""
        config, settings = self.config, (self.engine, self.execution.eval_batch_tokens)
        with uncompiled(self.model):
            if config.task == "sft":
                examples = self.corpus.validation_examples(length, config.eval_documents)
                return score_answers(self.model, examples, *settings)
            documents = self.corpus.validation_windows(length, config.eval_span, config.eval_documents)
            return score_documents(self.model, documents, *settings)

    def note_best(self, perplexity: float) -> None:
        """Of what has trained: step 0 has no checkpoint. Every worker has scored the same, so that all save or none."""
        so_far = self.best["perplexity"] if self.best else math.inf
        if self.step and perplexity < so_far:
            self.best = {"step": self.step, "perplexity": perplexity}

    def can_evaluate(self, length: int) -> bool:
        if self.config.task == "sft":
            return self.corpus.has_validation_examples(length)
        return self.config.eval_span % length == 0

    def save(self) -> None:
        """What the next attempt needs: trainable parameters, optimiser state, random state; the data's position is
        the step. It is the same for every engine and any number of workers.

        Raises:
            OSError: on every worker, if worker 0 cannot write.
            NonFiniteLoss: as :meth:`finish_step`.
        """
        self.finish_step()
        tensors = {f"model/{name}": tensor for name, tensor in self.engine.weights().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.engine.optimizer_state().items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.engine.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.engine.device)
        failure = None
        if self.engine.rank == 0:
            try:
                save_checkpoint(
                    self.checkpoints,
                    self.step,
                    tensors,
                    {"training": self.config.not_at_default(), "best": self.best},
                    keep_last=self.execution.keep_last,
                    keep_every=self.execution.keep_every,
                    best=self.best["step"] if self.best and self.execution.keep_best else None,
                )
            except OSError as error:
                failure = error
        if self.engine.any(failure is not None):
            raise failure or OSError(f"worker 0 could not write the checkpoint of step {self.step}")
        self.saved_at = time.monotonic()
        self.emit("saved", step=self.step)

    def start(self) -> nn.Module:
        """Hands model and optimiser to the engine, as the newest whole checkpoint left them if there is one; returns
        the module to train.

        Raises:
            InputError: the checkpoint is another trial's.
        """
        if layers_compile(self.model, self.config, self.execution, self.engine):
            compile_layers(self.model, fall_back=self.execution.compile_layers == "auto")
        # Worker 0 chooses for all, and it alone reads everything to verify it.
        newest = newest_step(self.checkpoints) if self.engine.rank == 0 else None
        self.step = int(self.engine.sum(torch.tensor(newest or 0)))
        if self.step == 0:
            return self.engine.prepare(self.model, self.optimizer, self.config.max_grad_norm)
        tensors, state = load_checkpoint(self.checkpoints, self.step)
        self.refuse_another_trials(tensors, state)
        self.best = state.get("best")  # checkpoints of earlier versions do not tell it
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model/{name}"])
        training_model = self.engine.prepare(self.model, self.optimizer, self.config.max_grad_norm)
        prefix = "optimizer/"
        self.engine.load_optimizer_state(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and self.engine.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.engine.device)
        self.emit("resume", step=self.step)
        return training_model

    def refuse_another_trials(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        ours, theirs = json.loads(json.dumps(self.config.not_at_default())), state.get("training", {})
        different = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        names = {name.removeprefix("model/") for name in tensors if name.startswith("model/")}
        shapes_agree = names == self.parameters.keys() and all(
            tensors[f"model/{name}"].shape == parameter.shape for name, parameter in self.parameters.items()
        )
        if different or not shapes_agree:
            what = ", ".join(sorted(different)) or "the model's parameters"
            raise InputError(
                f"the checkpoints in {self.checkpoints} are another trial's: {what} differ. Move them away, or train "
                "in another folder"
            )
