"""One trial's training loop, from a loaded model to its last evaluation, in plain PyTorch.

Progress is reported through ``emit(event, **fields)``, one call per event. ``make_event`` in
orchestrator/records/events.py refuses other fields. The events and their fields:

    model    parameters, trainable_parameters, attention_backend, compiled_layers (whether)
    resume   step: of the checkpoint that training continues from
    eval     step, tokens, context_length, perplexity, nll and num_tokens (a list each, one entry a document)
    step     step, tokens, loss, learning_rate, grad_norm, seconds, tokens_per_second, peak_memory_gib,
             mfu (on a GPU that workloads/budget/devices.py knows)
    saved    step
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from workloads.adaptation.methods import count_parameters, trainable_parameters
from workloads.attention.interface import backend_of
from workloads.budget import Device, ModelShape, model_flops_utilisation
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import Batch, ExampleCorpus, PackedCorpus
from workloads.engines.engine import AsyncScalars, Engine
from workloads.errors import InputError
from workloads.evaluation.answers import to_device
from workloads.evaluation.intervals import DocumentScores
from workloads.models.rotary import padded_inputs
from workloads.models.source import ModelSource
from workloads.training.checkpoint import load_checkpoint, newest_step, save_checkpoint
from workloads.training.compilation import compile_layers, layers_compile
from workloads.training.evaluator import BestEvaluation, Emit, Evaluator, NonFiniteLoss
from workloads.training.optimization import build_optimizer, set_learning_rate
from workloads.training.setup import build_model
from workloads.training.trial_data import trial_data
from workloads.training.trial_state import (
    collect_state,
    load_optimizer_and_random_state,
    load_parameters,
    refuse_another_trial,
)

# What a caller may request between two steps: a checkpoint, or to stop with one.
Request = Literal["save", "stop"]


def run(
    source: ModelSource,
    config: TrainingConfig,
    execution: ExecutionConfig,
    corpus: PackedCorpus | ExampleCorpus,
    checkpoints: Path,
    engine: Engine,
    emit: Emit,
    step_0_scores: DocumentScores | None = None,
    poll_request: Callable[[], Request | None] = lambda: None,
) -> bool:
    """Trains and evaluates one trial, from its newest checkpoint if it has one. Returns whether it finished.

    Args:
        step_0_scores: the scores of step 0, if already measured by an untuned trial with the same positions.
        poll_request: called after each step, its evaluation and its checkpoint, on worker 0 alone.

    Raises:
        InputError: the batch does not divide among the workers, or the model cannot be trained as configured.
        NonFiniteLoss: in the step it happens.
    """
    if config.steps and config.batch % engine.num_workers:
        raise InputError(f"a batch of {config.batch} sequences does not divide among {engine.num_workers} workers")
    if config.quantization != "none" and execution.engine == "zero3":
        raise InputError(
            f"quantization {config.quantization} with the engine zero3, which cannot shard quantised weights; "
            "choose the engine zero2 or ddp"
        )
    model = build_model(source, config, engine, execution)
    total, trainable = count_parameters(model)
    emit(
        "model",
        parameters=total,
        trainable_parameters=trainable,
        attention_backend=backend_of(model),
        compiled_layers=layers_compile(model, config, execution, engine.device, engine.num_workers),
    )
    return Trial(model, config, execution, corpus, checkpoints, engine, emit, step_0_scores, poll_request).run()


@dataclass(frozen=True)
class PendingStep:
    """A step that the device was given and may not have finished.

    Args:
        step, tokens: counted from the trial's start, this step included.
        batch_tokens: of this step alone.
        scalars: its loss and the norm of its gradient.
        started: on the clock of ``time.perf_counter``.
    """

    step: int
    tokens: int
    batch_tokens: int
    learning_rate: float
    scalars: AsyncScalars
    started: float


@dataclass
class Trial:
    """The loop over steps, with its state between them."""

    model: nn.Module
    config: TrainingConfig
    execution: ExecutionConfig
    corpus: PackedCorpus | ExampleCorpus
    checkpoints: Path
    engine: Engine
    emit: Emit
    step_0_scores: DocumentScores | None = None
    poll_request: Callable[[], Request | None] = lambda: None
    step: int = 0
    next_batch: Batch | None = None  # of the next step, prepared while the device works
    pending: PendingStep | None = None  # the last step, until it is reported
    previous_step_end: float = -math.inf  # on the clock of perf_counter

    def __post_init__(self) -> None:
        self.data = trial_data(self.corpus, self.config)
        self.evaluator = Evaluator(
            self.model, self.config, self.execution, self.data, self.engine, self.emit, self.step_0_scores
        )
        self.saved_at = time.monotonic()

    def run(self) -> bool:
        """Trains, evaluates and saves up to the last step. Returns False if it was requested to stop before."""
        if self.config.steps == 0:
            self.engine.prepare(self.model)
            self.evaluator.evaluate(step=0, at_original_length=True)
            return True
        training_model = self.start()
        training_model.train()
        if self.step == 0:
            self.evaluate(at_original_length=False)
        while self.step < self.config.steps:
            self.train_step(training_model)
            last = self.step == self.config.steps
            if last or self.step % self.config.eval_every == 0:
                self.evaluate(at_original_length=last)
            saved = last or self._is_checkpoint_step()
            if saved:
                self.save()
            request = None if last else self._pending_request()
            if request and not saved:
                self.save()
            if request == "stop":
                return False
        return True

    def start(self) -> nn.Module:
        """Gives model and optimiser to the engine, as the newest whole checkpoint left them if there is one.

        Returns the module to train.

        Raises:
            InputError: the checkpoint is another trial's.
        """
        config, engine = self.config, self.engine
        parameters = trainable_parameters(self.model)
        self.optimizer = build_optimizer(self.model, config)
        if layers_compile(self.model, config, self.execution, engine.device, engine.num_workers):
            compile_layers(self.model, fall_back=self.execution.compile_layers == "auto")
        # Worker 0 chooses for all, and it alone reads everything to verify it.
        newest = newest_step(self.checkpoints) if engine.rank == 0 else None
        self.step = int(engine.sum(torch.tensor(newest or 0)))
        if self.step == 0:
            return engine.prepare(self.model, self.optimizer, config.max_grad_norm)
        tensors, state = load_checkpoint(self.checkpoints, self.step)
        refuse_another_trial(self.checkpoints, tensors, state, config, parameters)
        if best := state.get("best"):  # checkpoints of earlier versions lack it
            self.evaluator.best = BestEvaluation(**best)
        load_parameters(parameters, tensors)
        training_model = engine.prepare(self.model, self.optimizer, config.max_grad_norm)
        load_optimizer_and_random_state(engine, tensors)
        self.emit("resume", step=self.step)
        return training_model

    def train_step(self, training_model: nn.Module) -> None:
        """Launches one step.

        Reports it immediately, or, if ``engine.runs_ahead``, once the next step is launched or :meth:`finish_step` is
        called.
        """
        config, engine = self.config, self.engine
        started = time.perf_counter()
        set_learning_rate(self.optimizer, config, self.step)
        batch = self.next_batch or self.data.batch(self.step)
        local_batch = batch.rows(slice(engine.rank, None, engine.num_workers))
        loss_sum = torch.zeros((), device=engine.device)
        micro_batches = local_batch.split(self.execution.micro_batch or len(local_batch))
        for index, micro_batch in enumerate(micro_batches):
            tokens, scored, mask = to_device(micro_batch, engine.device)
            # Weight tokens equally over the global batch: averaging the means of workers or micro-batches would
            # overweight tokens of those with fewer.
            weights = scored / batch.num_scored
            with engine.accumulate(training_model, last=index == len(micro_batches) - 1):
                with engine.autocast():
                    loss = training_model(
                        tokens, weights, **padded_inputs(self.model, mask), **self.data.model_inputs(tokens)
                    )
                engine.backward(loss)
            loss_sum += loss.detach()
        scalars = engine.update(loss_sum)
        self.step += 1
        # While the device works: its next batch.
        self.next_batch = self.data.batch(self.step) if self.step < config.steps else None
        self.finish_step()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        tokens_so_far = self.data.tokens_before(self.step)
        self.pending = PendingStep(self.step, tokens_so_far, batch.num_tokens, learning_rate, scalars, started)
        if not engine.runs_ahead:
            self.finish_step()

    def finish_step(self) -> None:
        """Waits for the pending step, if there is one, and reports it.

        Raises:
            NonFiniteLoss: for the first bad step; neither it nor later steps changed the weights.
        """
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        # Every worker has the same loss and the same norm, so all stop here or none does.
        loss, grad_norm = step.scalars.read()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(
                f"step {step.step}: loss {loss}, gradient norm {grad_norm}; nothing was updated. "
                "Lower the learning rate, or train in float32"
            )
        now = time.perf_counter()
        seconds = now - max(step.started, self.previous_step_end)
        self.previous_step_end = now
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
            **self._utilisation(tokens_per_second),
        )

    def evaluate(self, at_original_length: bool) -> None:
        """Finishes the pending step and evaluates: see :meth:`workloads.training.evaluator.Evaluator.evaluate`."""
        self.finish_step()
        self.evaluator.evaluate(self.step, at_original_length)

    def save(self) -> None:
        """Writes a checkpoint of this step.

        Raises:
            OSError: on every worker, if worker 0 cannot write.
            NonFiniteLoss: as :meth:`finish_step`.
        """
        self.finish_step()
        tensors, best = collect_state(self.engine), self.evaluator.best
        failure = None
        if self.engine.rank == 0:
            try:
                save_checkpoint(
                    self.checkpoints,
                    self.step,
                    tensors,
                    {"training": self.config.not_at_default(), "best": asdict(best) if best else None},
                    keep_last=self.execution.keep_last,
                    keep_every=self.execution.keep_every,
                    best=best.step if best and self.execution.keep_best else None,
                )
            except OSError as error:
                failure = error
        if self.engine.any(failure is not None):
            raise failure or OSError(f"worker 0 could not write the checkpoint of step {self.step}")
        self.saved_at = time.monotonic()
        self.emit("saved", step=self.step)

    def _is_checkpoint_step(self) -> bool:
        execution, best = self.execution, self.evaluator.best
        periods = [execution.checkpoint_every, *([execution.keep_every] if execution.keep_every else [])]
        is_best = execution.keep_best and best is not None and best.step == self.step
        return is_best or any(self.step % period == 0 for period in periods)

    def _pending_request(self) -> Request | None:
        """The request that worker 0 has, or its clock makes, agreed on by all workers."""
        requests: tuple[Request | None, ...] = (None, "save", "stop")
        index = requests.index(self.poll_request() or self._request_by_clock()) if self.engine.rank == 0 else 0
        return requests[int(self.engine.sum(torch.tensor(index)))]

    def _request_by_clock(self) -> Request | None:
        minutes = (time.monotonic() - self.saved_at) / 60
        return "save" if minutes >= self.execution.checkpoint_minutes else None

    def _utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOPs utilisation, where the device's peak is known; not of examples, whose lengths differ."""
        device = Device.named(self.engine.device_name())
        if device is None or self.config.task == "sft":
            return {}
        shape = ModelShape.of(self.model.config)
        per_worker = tokens_per_second / self.engine.num_workers
        return {"mfu": model_flops_utilisation(shape, self.config, per_worker, device)}
