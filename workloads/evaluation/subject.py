"""The model under evaluation: a trial, an exported model, an adapter or any other, extended to the longest length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from transformers.utils import logging as transformers_logging

from workloads.attention.interface import use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.engines.allocator import keep_freed_memory
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.evaluation.options import CommonOptions
from workloads.files.given import existing_path
from workloads.models.adapters import load_adapter
from workloads.models.positions import (
    Positions,
    extended_by_longspan,
    is_extended,
    max_context_length,
    original_context_length,
    reach,
)
from workloads.models.source import ModelSource, check_vocabulary, is_adapter
from workloads.trained import TrainedTrial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """The model under evaluation. ``about`` describes it in the results."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    lengths: list[int]
    about: dict[str, Any]


def load_subject(options: CommonOptions, console: Console) -> Subject:
    """Loads the model on its device, its positions extended to the longest length.

    Raises:
        InputError: the model cannot be loaded, its positions cannot be replaced, or its tokenizer has more tokens than
            it has embeddings.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; leave the flag out to compute on the CPU")
    gpu = torch.cuda.is_available() and options.device != "cpu"
    if not gpu:
        keep_freed_memory()
    precision = ("bfloat16" if gpu else "float32") if options.precision == "auto" else options.precision
    engine = Engine(torch.device("cuda" if gpu else "cpu"), precision)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # a model's problems are reported in one error
    found = existing_path(options.model)
    about: dict[str, Any] = {"name": options.model, "label": found.resolve().name if found else options.model}
    if found and TrainedTrial.is_at(options.model):
        if options.positions != "none":
            raise InputError(f"--positions {options.positions}: a trial has its own positions; leave the flag out")
        if options.original_length is not None:
            raise InputError(f"--original-length {options.original_length}: a trial has its own; leave the flag out")
        trial = TrainedTrial.open(found)
        step = trial.step(unfinished=True, checkpoint=options.checkpoint)
        source, training = trial.base(), trial.training
        model = trial.build(source, step, engine)
        positions = training.positions
        about |= {"label": f"{Path(source.name).name}, {trial.label}", "base": source.name}
        about |= {"method": training.method, "step": step, "steps": training.steps}
        longest = max(options.lengths, default=training.context_length)
        if step < training.steps:
            console.print(f"note: {trial.describe_step(step, options.checkpoint)}")
    else:
        if options.checkpoint != "last":
            raise InputError(f"--checkpoint {options.checkpoint}: {options.model} is no trial's folder; leave it out")
        source = ModelSource.parse(options.model)
        config = source.config(options.original_length)
        if assumption := reach(config).assumption:
            console.print(f"note: {assumption}: then give --original-length")
        longest = max(options.lengths, default=max_context_length(config))
        positions = _positions(config, longest, options, console)
        if is_adapter(Path(source.location)):
            model = load_adapter(Path(source.location), dtype=engine.dtype)
            use_pattern(model.get_base_model(), AttentionPattern(name="full"))
            about["base"] = model.peft_config["default"].base_model_name_or_path
        else:
            model = source.load(
                longest, positions, engine.dtype, device=engine.device, original_length=options.original_length
            )
            use_pattern(model, AttentionPattern(name="full"))
        model = model.to(engine.device)
    original = original_context_length(model.config)
    lengths = sorted({*(options.lengths or [longest]), *([original] if original < longest else [])})
    if longest > max_context_length(model.config):
        console.print(
            f"note: {longest:,} tokens lie beyond the {max_context_length(model.config):,} that this model's positions "
            "are made for" + ("" if is_extended(model.config) else "; --positions yarn or linear would extend them")
        )
    tokenizer = source.tokenizer()
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, options.model)
    about |= {
        "identity": source.identity,
        "positions": positions,
        "original_context_length": original,
        "reach": max_context_length(model.config),
        "attention": "full",
    }
    return Subject(model, tokenizer, engine, lengths, about)


def _positions(config: Any, longest: int, options: CommonOptions, console: Console) -> Positions:
    """How the positions of a model that is no trial are extended to ``longest`` tokens.

    Raises:
        InputError: it was trained with extended positions of its own, which these would replace.
    """
    positions, reached = options.positions, max_context_length(config)
    if positions == "none":
        return "none"
    if longest <= reached:
        console.print(f"note: --positions {positions} changes nothing: the model reaches {reached:,} tokens as it is")
        return "none"
    if extended_by_longspan(config):
        raise InputError(
            f"--positions {positions}: this model was exported with positions of its own, made for {reached:,} tokens, "
            f"and would be another model with others. Give --lengths up to {reached:,}, or leave --positions out: "
            "beyond, it is then scored with the positions that it has"
        )
    if is_extended(config):
        original = original_context_length(config)
        console.print(
            f"note: the model comes with positions of its own, from {original:,} to {reached:,} tokens; --positions "
            f"{positions} replaces them by others, from {original:,} to {longest:,}, at every length that is scored"
        )
    return positions
