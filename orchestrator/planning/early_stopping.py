"""Early stopping: ends trials that fall behind comparable trials, at rungs.

A rung is an evaluation at which the trials of one context length are compared, counted in tokens trained on. The
trial's worker 0 judges it there, between two steps, and asks it to end with a checkpoint: nothing is killed, and a
sweep that wants the whole trial resumes it. A trial's score at a rung and the decision are one small file in the
sweep's folder. Once written it is final: no trial is judged twice at a rung, whatever restarts.

``asha`` is asynchronous successive halving (Li et al. 2018, arXiv 1810.05934) in its stopping form: a trial continues
if it is among the best 1/eta of those that have reached the rung so far, itself included, and is stopped otherwise. The
paper pauses every trial at a rung and promotes it once it is among the best. We stop instead, because a sweep's trials
are few and known and a start costs 20 to 40 s: a paused trial would be loaded again for each promotion, and the last
rungs would wait for the slowest. The price: the first trials at a rung are judged mildly, and a trial stopped by better
early ones stays stopped even if enough worse ones follow to put it among the best. The best score at a rung is never
stopped, in any order.

``median`` (after Golovin et al. 2017, Google Vizier): a trial is stopped at any evaluation from the first rung on if
its best score since that rung is above the median of the others'. Vizier takes the median of the others' running
averages; perplexity falls so steeply that its average is far above any current value, and would stop nothing. The
others therefore count with their best too.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.axes import distinction
from orchestrator.records.json_files import expect_fields
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import TrialSpec
from workloads.config import TrainingConfig
from workloads.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """The rule of a sweep.

    Args:
        reduction_factor: ASHA's eta: 1/eta of the trials at a rung continue, and the next rung is eta times as far.
        first_rung: a share of a trial's tokens (up to 1), or tokens, at which it is first judged.
        min_trials: trials, the judged one included, that must have reached a rung before any is stopped there.
        within_method: compare a trial only with those of its method and of its values of the sweep's axes.
        axes: the sweep's axes, by field.

    Raises:
        InputError: a value outside its range.
    """

    rule: Literal["asha", "median"]
    reduction_factor: float = 3.0
    first_rung: float = 1 / 9
    min_trials: int = 3
    within_method: bool = False
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 < self.reduction_factor < math.inf:
            raise InputError(f"--reduction-factor {self.reduction_factor:g}: expected more than 1, such as 3")
        if not 0 < self.first_rung < math.inf:
            raise InputError(f"--first-rung {self.first_rung:g}: expected a share of a trial such as 0.1, or tokens")
        if self.min_trials < 2:
            raise InputError(f"--min-trials {self.min_trials}: expected at least 2: a trial is compared with others")

    @classmethod
    def of(cls, options: RunOptions, spec: SweepSpec) -> EarlyStopping | None:
        """The rule that a sweep's flags ask for; None: no early stopping."""
        if options.early_stopping == "none":
            return None
        within = {"context": False, "method": True, "auto": spec.search != "none"}[options.early_stopping_among]
        factor = options.reduction_factor
        return cls(
            rule=options.early_stopping,
            reduction_factor=factor,
            first_rung=options.first_rung if options.first_rung is not None else factor**-2,
            min_trials=options.min_trials,
            within_method=within,
            axes=tuple(spec.axes),
        )

    def rungs(self, training: TrainingConfig) -> list[int]:
        """The steps at which a trial is judged, in increasing order: evaluations before the last.

        ASHA's are the first evaluations at or after first_rung x eta^k tokens; the median rule's are all from the first
        rung on. Where sequences are padded (sft) tokens count the padding, so that trials meet at the same steps.
        """
        steps, every = training.steps, training.eval_every
        tokens_a_step = training.batch * training.context_length
        level = self.first_rung * steps if self.first_rung <= 1 else self.first_rung / tokens_a_step
        # A millionth less, so that a third of 300 steps is step 100 in floating point too.
        first = max(1, math.ceil(level / every - 1e-6)) * every
        if self.rule == "median":
            return list(range(first, steps, every))
        rungs = []
        while first < steps:
            if first not in rungs:
                rungs.append(first)
            level *= self.reduction_factor
            first = max(1, math.ceil(level / every - 1e-6)) * every
        return rungs

    def cutoff(self, score: float, others: list[float]) -> float | None:
        """The worst score with which a trial continues, given the others'; None if they are too few to judge."""
        if len(others) + 1 < self.min_trials:
            return None
        if self.rule == "median":
            return statistics.median(others)
        scores = sorted([score, *others])
        return scores[max(1, math.floor(len(scores) / self.reduction_factor)) - 1]

    def reason(self, score: float, cutoff: float, num_others: int, tokens: int) -> str:
        """Why a trial is stopped, in words."""
        if self.rule == "median":
            return (
                f"its best perplexity by {tokens:,} tokens, {score:.3f}, is above {cutoff:.3f}, the median of "
                f"{num_others} others"
            )
        best = max(1, math.floor((num_others + 1) / self.reduction_factor))
        return (
            f"perplexity {score:.3f} at {tokens:,} tokens is not among the best {best} of {num_others + 1} there "
            f"(up to {cutoff:.3f})"
        )


class Rungs:
    """Scores and decisions in ``sweeps/<name>/rungs/<context length>/<tokens>/<fingerprint>.json``.

    A file's fields: label, method (with its values of the sweep's axes), scored_on (only trials with the same value are
    comparable), step, tokens, scores (by rule), stop; for a trial that was compared also rule, cutoff and compared_with
    (fingerprint: score), and for one that was stopped its reason.
    """

    def __init__(self, storage: Storage, sweep: str, settings: EarlyStopping) -> None:
        self.storage, self.sweep, self.settings = storage, sweep, settings

    def enter(self, trial: TrialSpec, record: TrialRecord) -> None:
        """Writes the scores of a finished trial, which is no longer judged, at its rungs."""
        evaluated = curve_of(trial, record)
        curve = {step: evaluated[step] for step in self.settings.rungs(trial.training) if step in evaluated}
        for step in curve:
            if trial.fingerprint not in self._entries(trial, step):
                self.storage.write(self.file(trial, step), self.entry(trial, step, curve) | {"stop": False})

    def forget(self, trial: TrialSpec) -> None:
        """Removes a trial's scores and decisions, because it starts over."""
        for step in self.settings.rungs(trial.training):
            self.storage.remove(self.file(trial, step))

    def judge(self, trial: TrialSpec, step: int, curve: dict[int, float]) -> dict[str, Any]:
        """The decision on a trial at a rung: the one written before, else a new one, which is written.

        Args:
            curve: its perplexity by step, at this rung and those before.
        """
        entries = self._entries(trial, step)
        if trial.fingerprint in entries:
            return entries[trial.fingerprint]
        settings = self.settings
        mine = self.entry(trial, step, curve)
        alike = ("scored_on", "method") if settings.within_method else ("scored_on",)
        others = {
            fingerprint: float(entry["scores"][settings.rule])
            for fingerprint, entry in entries.items()
            if all(entry[name] == mine[name] for name in alike)
        }
        score = mine["scores"][settings.rule]
        cutoff = settings.cutoff(score, list(others.values()))
        mine |= {"rule": settings.rule, "stop": False, "cutoff": cutoff, "compared_with": others}
        if cutoff is not None and score > cutoff:
            mine["stop"] = True
            mine["reason"] = settings.reason(score, cutoff, len(others), mine["tokens"])
        self.storage.write(self.file(trial, step), mine)
        return mine

    def _entries(self, trial: TrialSpec, step: int) -> dict[str, dict[str, Any]]:
        """What trials have written at a rung, by fingerprint; a damaged file counts as none."""
        entries = {}
        for fingerprint, entry in self.storage.read_folder(self.folder(trial, step)).items():
            with self.storage.set_apart():
                expect_fields(entry, fingerprint, scored_on=str, method=str, scores=dict, stop=bool)
                # JSON has no infinity: a perplexity that overflowed is written as null.
                entry["scores"] = {
                    rule: math.inf if score is None else score for rule, score in entry["scores"].items()
                }
                expect_fields(entry["scores"], fingerprint, **{self.settings.rule: float})
                entries[fingerprint] = entry
        return entries

    def entry(self, trial: TrialSpec, step: int, curve: dict[int, float]) -> dict[str, Any]:
        """The fields of a file that follow from the trial and its score alone."""
        return {
            "label": trial.label,
            "method": " ".join([trial.training.method, distinction(trial.training, self.settings.axes)]).strip(),
            "scored_on": scored_on(trial),
            "step": step,
            "tokens": step * trial.training.batch * trial.training.context_length,
            "scores": scores_at(curve, step),
        }

    def folder(self, trial: TrialSpec, step: int) -> str:
        """A rung's folder, relative to the storage root."""
        length = trial.training.context_length
        return f"sweeps/{self.sweep}/rungs/{length}/{step * trial.training.batch * length}"

    def file(self, trial: TrialSpec, step: int) -> str:
        """A trial's file at a rung, relative to the storage root."""
        return f"{self.folder(trial, step)}/{trial.fingerprint}.json"


def curve_of(trial: TrialSpec, record: TrialRecord) -> dict[int, float]:
    """Perplexity at the trained length by step, from the journal."""
    return {event.step: event.perplexity for event in record.curve(trial.training.context_length)}


def scores_at(curve: dict[int, float], step: int) -> dict[str, float]:
    """A trial's score at a rung by rule, from its perplexity at the rungs; lower is better."""
    so_far = [math.inf if math.isnan(curve[s]) else curve[s] for s in sorted(curve) if s <= step]
    return {"asha": so_far[-1], "median": min(so_far)}


def scored_on(trial: TrialSpec) -> str:
    """A hash of what was scored and how: only trials with the same hash are comparable."""
    training = trial.training
    what = [
        trial.identities.data, trial.identities.tokenizer, training.task, training.context_length,
        training.eval_documents, training.eval_span, trial.result_version,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
