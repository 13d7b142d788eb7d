"""A trained trial, read from its folder: configuration, base model, weights and scores.

The folder is the one that a sweep writes (``runs/trials/<fingerprint>``):

    trial.json      model, data, identities, training (the fields of TrainingConfig), label, model_location
    checkpoints/    step-00000100 and the like: see workloads.training.checkpoint
    journal.jsonl   one JSON object a line: see workloads.training.loop for the events
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from workloads.adaptation.methods import trainable_parameters
from workloads.config import ExecutionConfig, Precision, TrainingConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError, reason
from workloads.files.given import existing_path
from workloads.files.journal_lines import parse_line
from workloads.models.source import ModelSource
from workloads.training.checkpoint import TENSORS, damage, newest_step, read_state, whole_steps
from workloads.training.setup import build_model
from workloads.training.trial_state import PARAMETER

# Of an eval event, what a reader of scores needs.
EVAL_FIELDS = {"step", "context_length", "perplexity"}


@dataclass(frozen=True)
class TrainedTrial:
    """One trial's folder. Make it with ``open``."""

    folder: Path
    model: str
    data: str
    model_identity: str
    data_identity: str
    training: TrainingConfig
    label: str
    eval_data: str | None = None
    model_location: str | None = None

    @staticmethod
    def is_at(name: str) -> bool:
        """Whether a user named a trial's folder."""
        return (path := existing_path(name)) is not None and (path / "trial.json").is_file()

    @classmethod
    def open(cls, folder: Path) -> TrainedTrial:
        """The trial in ``folder``.

        Raises:
            InputError: it is no trial's folder, or one of another version of longspan.
        """
        file = folder / "trial.json"
        try:
            values = json.loads(file.read_text("utf-8"))
            return cls(
                folder=folder,
                model=values["model"],
                data=values["data"],
                model_identity=values["identities"]["model"],
                data_identity=values["identities"]["data"],
                training=TrainingConfig(**values["training"]),
                label=values.get("label") or folder.resolve().name,  # earlier versions wrote none
                eval_data=values.get("eval_data"),
                model_location=values.get("model_location"),
            )
        except OSError as error:
            raise InputError(f"{folder} is no trial's folder (no trial.json in it); {_trials_near(folder)}") from error
        except InputError:
            raise
        except Exception as error:  # whatever values of other types make the fields' checks raise
            raise InputError(
                f"{file} is not what this version of longspan writes ({reason(error)}); read it with the version that "
                "trained it, or run its sweep again to rewrite it"
            ) from error

    def base(self, location: str | None = None) -> ModelSource:
        """The base model, at ``location`` (a folder or an id) or by default where it was in training.

        Raises:
            InputError: it has moved, or another model is there.
        """
        given = location or self._base_location()
        try:
            source = ModelSource.parse(given)
        except InputError as error:
            raise InputError(
                f"the base model of {self.folder}, {self.model}, is not at {given} ({error}); give its "
                "location with --base"
            ) from error
        if source.identity != self.model_identity:
            raise InputError(
                f"{self.folder} was trained from the base {self.model_identity}, but {given} is "
                f"{source.identity}; give the base that it was trained from with --base"
            )
        return source

    def _base_location(self) -> str:
        if self.model_identity.startswith("hub:"):
            return self.model_identity.removeprefix("hub:")  # with the commit, since the id may point to another now
        if self.model.startswith("builtin:"):
            return self.model
        return self.model_location or self.model

    def step(self, unfinished: bool = False, checkpoint: str = "last") -> int:
        """The step of the chosen checkpoint.

        Args:
            unfinished: allow ``last`` and ``best`` for a trial that has not reached its last step.
            checkpoint: ``last``; ``best``, the evaluation with the lowest perplexity at the trained length; or a step.

        Raises:
            InputError: there is no such checkpoint, it is not whole, or for ``last`` and ``best`` the trial is
                unfinished.
        """
        if self.training.steps == 0:
            return 0
        if checkpoint == "last":
            return self._last(unfinished)
        if checkpoint == "best":
            best = read_state(self._checkpoints, self._last(unfinished)).get("best")
            if best is None:
                raise InputError(f"{self.folder} does not say which of its checkpoints is the best; give a step")
            return self._kept(best["step"], "its best evaluation was there, and --keep-best keeps it while it trains")
        if not checkpoint.isdecimal():
            raise InputError(f"checkpoint {checkpoint!r}: expected last, best, or a step such as 300")
        return self._kept(int(checkpoint), "--keep-every of its sweep keeps some of them")

    def describe_step(self, step: int, checkpoint: str) -> str:
        """A line on which checkpoint before a trial's last step was taken."""
        which = "this trial is not finished" if checkpoint == "last" else f"checkpoint {checkpoint}"
        return f"{which}: step {step} of {self.training.steps}"

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _kept(self, step: int, why: str) -> int:
        kept = whole_steps(self._checkpoints)
        if step not in kept:
            found = ", ".join(map(str, kept)) or "none"
            raise InputError(f"{self.folder} has no whole checkpoint of step {step} ({why}); there are: {found}")
        return step

    def _last(self, unfinished: bool) -> int:
        steps, checkpoints = self.training.steps, self._checkpoints
        step = newest_step(checkpoints)
        damaged = "".join(
            f" ({folder.name} is damaged: {problem})"
            for folder in sorted(checkpoints.glob("step-*"), reverse=True)[:1]
            if (problem := damage(folder))
        )
        again = "run its sweep's command again, which resumes it"
        if failure := self._failure():
            again = f"its training failed ({failure}): fix that, then {again}"
        if step is None:
            raise InputError(f"{self.folder} has no whole checkpoint{damaged}; {again}")
        if step < steps and not unfinished:
            raise InputError(
                f"{self.folder} is unfinished: its newest whole checkpoint is of step {step} of {steps}{damaged}; "
                f"{again}, or take that step with --unfinished"
            )
        return step

    def build(self, source: ModelSource, step: int, engine: Engine | None = None) -> nn.Module:
        """The trial's model with the weights of ``step`` and its training's attention pattern.

        It is on ``engine``'s device and computes in its precision; by default on the CPU, in training's precision. A
        base that was in FP8 in training is loaded unquantised, which any machine can compute; what trained fits it too.

        Raises:
            InputError: the checkpoint's parameters are not those that this trial trains.
        """
        engine = engine or Engine(torch.device("cpu"), self.training.precision)
        precision: Precision = "float32" if engine.dtype == torch.float32 else "bfloat16"
        quantization = "none" if self.training.quantization == "fp8" else self.training.quantization
        training = replace(self.training, precision=precision, quantization=quantization)
        model = build_model(source, training, engine, ExecutionConfig())
        if self.training.steps:
            self._restore(trainable_parameters(model), self.folder / "checkpoints" / f"step-{step:08d}")
        return model

    def _restore(self, parameters: dict[str, nn.Parameter], checkpoint: Path) -> None:
        try:
            # One by one, without the optimiser's state, which is twice as large.
            with safe_open(checkpoint / TENSORS, framework="pt") as file:
                names = {n.removeprefix(PARAMETER) for n in file.keys() if n.startswith(PARAMETER)}
                if difference := sorted(names ^ parameters.keys()):
                    raise InputError(
                        f"{checkpoint} holds another model's parameters: {len(names)} where this trial trains "
                        f"{len(parameters)}; {difference[0]} is in one of them only"
                    )
                for name, parameter in parameters.items():
                    tensor = file.get_tensor(PARAMETER + name)
                    if tensor.shape != parameter.shape:
                        raise InputError(
                            f"{checkpoint} holds another model's parameters: {name} is {tuple(tensor.shape)} there and "
                            f"{tuple(parameter.shape)} in {self.model}"
                        )
                    parameter.data.copy_(tensor)
        except SafetensorError as error:
            raise InputError(f"{checkpoint / TENSORS} cannot be read as safetensors ({error})") from error

    def evaluations(self) -> list[dict[str, Any]]:
        """The journal's ``eval`` events: the last of each (context length, step), in that order."""
        evals = [event for event in self._events() if event["event"] == "eval" and event.keys() >= EVAL_FIELDS]
        events = {(event["context_length"], event["step"]): event for event in evals}
        return [events[key] for key in sorted(events)]

    def _failure(self) -> str | None:
        """The reason of its last attempt's failure, if it failed."""
        ends = [event for event in self._events() if event["event"] in ("started", "failed", "finished")]
        return ends[-1].get("reason") if ends and ends[-1]["event"] == "failed" else None

    def _events(self) -> Iterator[dict[str, Any]]:
        try:
            lines = (self.folder / "journal.jsonl").read_bytes().splitlines()
        except OSError:
            return  # not trained by a sweep
        for line in lines:
            with contextlib.suppress(ValueError):
                yield parse_line(line)


def _trials_near(folder: Path) -> str:
    """Suggests the folder that the user may have meant."""
    for trials in (folder / "trials", folder) if existing_path(str(folder)) else ():
        found = sorted(file.parent for file in trials.glob("*/trial.json"))
        if found:
            shown = ", ".join(str(path) for path in found[:5])
            return f"give one of the {len(found)} trials below it: {shown}{', ...' if len(found) > 5 else ''}"
    return "expected runs/trials/<fingerprint>, as the end of a sweep names it"
