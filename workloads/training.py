"""One trial's training loop, from a loaded model to its last evaluation, in plain PyTorch.

What happens is told through ``emit(event, **fields)``, one call an event; whoever runs the trial writes them down.
The events and their fields:

    model    parameters, trainable_parameters, attention_backend
    resume   step: training goes on from this checkpoint
    eval     step, tokens, context_length, perplexity, nll and num_tokens (a list each, one entry a document)
    step     step, tokens, loss, learning_rate, grad_norm, seconds, tokens_per_second, peak_memory_gib
    saved    step
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workloads.adaptation import adapt, compute_dtype, count_parameters, trainable_parameters
from workloads.attention import AttentionPattern, backend_of, document_ids, use_pattern
from workloads.checkpoint import load_newest, save_checkpoint
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import Batch, ExampleCorpus, PackedCorpus
from workloads.engine import Engine
from workloads.errors import InputError
from workloads.evaluation.answers import score_answers, to_device
from workloads.evaluation.bootstrap import DocumentScores
from workloads.evaluation.perplexity import next_token_losses, score_documents
from workloads.models import ModelSource
from workloads.optimization import build_optimizer, set_learning_rate
from workloads.positions import original_context_length
from workloads.quantization import nf4_loading

Emit = Callable[..., None]


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient became NaN or infinite."""


def build_model(source: ModelSource, config: TrainingConfig, engine: Engine, execution: ExecutionConfig) -> nn.Module:
    """The model of a trial, on its device, with its positions, its attention pattern and what trains."""
    torch.manual_seed(config.seed)  # LoRA's A matrices are random
    dtype = compute_dtype(config.precision)
    quantized = nf4_loading(engine.device, dtype) if config.quantization == "nf4" else None
    model = source.load(config.context_length, config.positions, dtype, quantized)
    pattern = AttentionPattern(name=config.attention, group_size=config.group_size)
    use_pattern(
        model,
        pattern,
        execution.attention_backend,
        device=engine.device,
        dtype=engine.dtype,
        documents=config.document_mask,
    )
    if execution.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapt(
        model,
        config.method,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
        train_layers=config.train_layers,
    )
    return model.to(engine.device)


def run(
    source: ModelSource,
    config: TrainingConfig,
    execution: ExecutionConfig,
    corpus: PackedCorpus | ExampleCorpus,
    checkpoints: Path,
    engine: Engine,
    emit: Emit,
    untuned: DocumentScores | None = None,
) -> None:
    """Trains and evaluates one trial, from its newest checkpoint if it has one.

    ``untuned``: what the model scores at step 0, if an untuned trial with the same positions has shown it already.

    Raises:
        InputError: the batch does not divide among the workers, or the model cannot be trained as asked.
        NonFiniteLoss: in the step it happens.
    """
    if config.steps and config.batch % engine.num_workers:
        raise InputError(f"a batch of {config.batch} sequences does not divide among {engine.num_workers} workers")
    model = build_model(source, config, engine, execution)
    total, trainable = count_parameters(model)
    emit("model", parameters=total, trainable_parameters=trainable, attention_backend=backend_of(model))
    Trial(model, config, execution, corpus, checkpoints, engine, emit, untuned).run()


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
    step: int = 0

    def __post_init__(self) -> None:
        self.original_length = original_context_length(self.model.config)

    def run(self) -> None:
        if self.config.steps == 0:
            self.evaluate(at_original_length=True)
            return
        self.parameters = trainable_parameters(self.model)
        self.optimizer = build_optimizer(self.model, self.config)
        self.resume()
        training_model = self.engine.wrap(self.model)
        training_model.train()
        if self.step == 0:
            self.evaluate(at_original_length=False)
        while self.step < self.config.steps:
            self.train_step(training_model)
            last = self.step == self.config.steps
            if last or self.step % self.config.eval_every == 0:
                self.evaluate(at_original_length=last)
            if last or self.step % self.execution.checkpoint_every == 0:
                self.save()

    def train_step(self, training_model: nn.Module) -> None:
        config, engine = self.config, self.engine
        started = time.perf_counter()
        set_learning_rate(self.optimizer, config, self.step)
        batch = self.train_batch()
        mine = batch.rows(slice(engine.rank, None, engine.num_workers))
        # The mean over all scored tokens of the batch; gradients are averaged over the workers, hence their number.
        share = engine.num_workers / batch.num_scored
        loss_sum = torch.zeros((), device=engine.device)
        pieces = mine.split(self.execution.micro_batch or len(mine))
        for index, piece in enumerate(pieces):
            tokens, scored, mask = to_device(piece, engine.device)
            with engine.accumulate(training_model, last=index == len(pieces) - 1):
                with engine.autocast():
                    logits = training_model(input_ids=tokens, attention_mask=mask, **self.boundaries(tokens)).logits
                loss = (next_token_losses(logits, tokens) * scored[:, 1:]).sum() * share
                loss.backward()
            loss_sum += loss.detach()
        limit = config.max_grad_norm if config.max_grad_norm is not None else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        loss_value = (engine.sum(loss_sum) / engine.num_workers).item()
        if not (torch.isfinite(grad_norm) and loss_value == loss_value and abs(loss_value) != float("inf")):
            raise NonFiniteLoss(
                f"step {self.step + 1}: loss {loss_value}, gradient norm {grad_norm.item()}; nothing was updated. "
                "Lower the learning rate, or train in float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        engine.synchronize()
        seconds = time.perf_counter() - started
        self.emit(
            "step",
            step=self.step,
            tokens=self.tokens,
            loss=loss_value,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm.item(),
            seconds=seconds,
            tokens_per_second=batch.num_tokens / seconds,
            peak_memory_gib=engine.peak_memory_gib(),
        )

    def train_batch(self) -> Batch:
        """The sequences of the next step, of all workers."""
        config = self.config
        where = (self.step, config.batch, config.context_length, config.seed)
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
        lengths = [self.config.context_length]
        if at_original_length and self.original_length not in lengths and self.can_evaluate(self.original_length):
            lengths.append(self.original_length)
        for length in lengths:
            if self.step == 0 and self.untuned is not None and length == self.config.context_length:
                scores = self.untuned
            elif self.config.task == "sft":
                examples = self.corpus.validation_examples(length, self.config.eval_documents)
                scores = score_answers(self.model, examples, self.engine, self.execution.eval_batch_tokens)
            else:
                documents = self.corpus.validation_windows(length, self.config.eval_span, self.config.eval_documents)
                scores = score_documents(self.model, documents, self.engine, self.execution.eval_batch_tokens)
            self.emit(
                "eval",
                step=self.step,
                tokens=self.tokens,
                context_length=length,
                perplexity=scores.perplexity,
                nll=scores.nll.tolist(),
                num_tokens=scores.tokens.tolist(),
            )

    def can_evaluate(self, length: int) -> bool:
        if self.config.task == "sft":
            return self.corpus.has_validation_examples(length)
        return self.config.eval_span % length == 0

    def save(self) -> None:
        """What the next attempt needs: trainable parameters, optimiser state, random state; the data's position is
        the step."""
        if self.engine.rank == 0:
            tensors: dict[str, torch.Tensor] = {f"model/{name}": p for name, p in self.parameters.items()}
            for name, parameter in self.parameters.items():
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
            tensors["random/cpu"] = torch.get_rng_state()
            if self.engine.device.type == "cuda":
                tensors["random/cuda"] = torch.cuda.get_rng_state(self.engine.device)
            save_checkpoint(self.checkpoints, self.step, tensors, state={})
        self.engine.barrier()
        self.emit("saved", step=self.step)

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        found = load_newest(self.checkpoints)
        if found is None:
            return
        tensors, state = found
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model/{name}"])
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                key: _place(key, tensors[f"optimizer/{key}/{name}"], parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and self.engine.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.engine.device)
        self.step = state["step"]
        self.emit("resume", step=self.step)


def _place(key: str, value: Any, parameter: nn.Parameter) -> torch.Tensor:
    # The fused optimiser keeps its step counter where the parameter is.
    return value.to(parameter.device, torch.float32 if key == "step" else parameter.dtype)
