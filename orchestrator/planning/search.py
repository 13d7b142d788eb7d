"""Search beyond grids: settings of each method at each context length, at random or by Optuna's TPE.

Each method has its own study at each context length and for each combination of the axes' values, over its learning
rate, LoRA's rank and the group size; the objective is the final perplexity at the trained length. A suggestion becomes
an ordinary trial of the sweep, identified by its fingerprint.

``sweeps/<name>/search.jsonl`` and the trials' journals are the whole state: a suggestion is written before its trial
starts. Suggestion n of a study depends only on the seed, on n, and on the outcomes of earlier suggestions: a killed
search rebuilds its studies from disk and continues as it would have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.records.events import Suggested
from orchestrator.records.journal import Journal
from orchestrator.records.segments import SegmentedJournal
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import TrialSpec
from workloads.config import group_size_in_tokens
from workloads.errors import InputError
from workloads.wording import LABELS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

# Without a given range, a search covers a method's own learning rate divided and multiplied by this.
RATE_FACTOR = 10
# Rates are rounded to this many digits: readable, and a typed one names the same trial.
SIGNIFICANT_DIGITS = 3
# TPE's first suggestions are random: a third of a study, at most Optuna's own ten.
MOST_RANDOM = 10
# Draws after a repeated suggestion: by the sampler, then at random. After that the space counts as exhausted.
SAMPLER_DRAWS, RANDOM_DRAWS = 10, 500
# The prefix of a trial's reason if its learning rate was too high: a result, not a fault.
DIVERGED = "NonFiniteLoss"


@dataclass(frozen=True)
class Space:
    """What a study searches: values of fields of TrainingConfig.

    Args:
        rates: the range of learning rates, uniform in their logarithm.
        choices: ranks, and group sizes as given (shares or tokens), by field.
    """

    rates: tuple[float, float]
    choices: dict[str, tuple[int | float, ...]]

    @classmethod
    def of(cls, spec: SweepSpec, base: TrialSpec) -> Space:
        """The space of the method and context length of ``base``, without fields that do not change its result.

        Raises:
            InputError: a group size is invalid at this context length, or there are fewer settings than trials.
        """
        training = base.training
        own = training.learning_rate
        rates = spec.search_learning_rate or (_rounded(own / RATE_FACTOR), _rounded(own * RATE_FACTOR))
        choices: dict[str, tuple[int | float, ...]] = {}
        if training.method != "full":
            choices["lora_rank"] = spec.search_rank
        if training.attention != "full":
            by_tokens = {group_size_in_tokens(size, training.context_length): size for size in spec.search_group_size}
            choices["group_size"] = tuple(by_tokens.values())
        space = cls(rates, {name: tuple(dict.fromkeys(values)) for name, values in choices.items() if values})
        if rates[0] == rates[1] and math.prod(map(len, space.choices.values())) < spec.search_trials:
            raise InputError(
                f"--search-trials {spec.search_trials}: {base.label} has fewer settings than that; lower "
                "it, or widen --search-learning-rate, --search-rank or --search-group-size"
            )
        return space

    @property
    def varied(self) -> tuple[str, ...]:
        """The fields that differ between its trials."""
        rate = ("learning_rate",) if self.rates[0] < self.rates[1] else ()
        return (*rate, *(name for name, values in self.choices.items() if len(values) > 1))

    def distributions(self) -> dict[str, BaseDistribution]:
        """The space in Optuna's types."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        choices = {name: CategoricalDistribution(values) for name, values in self.choices.items()}
        return {"learning_rate": FloatDistribution(*self.rates, log=True), **choices}

    def trial(self, base: TrialSpec, parameters: dict[str, Any]) -> TrialSpec:
        """``base`` with these settings."""
        values = dict(parameters)
        if "group_size" in values:
            values["group_size"] = group_size_in_tokens(values["group_size"], base.training.context_length)
        training = dataclasses.replace(base.training, **values)
        named = [f"{LABELS[name].short} {_short(getattr(training, name))}" for name in self.varied]
        return dataclasses.replace(base, training=training, distinction=" ".join([base.distinction, *named]).strip())

    def own(self, base: TrialSpec) -> dict[str, Any] | None:
        """The parameters of ``base`` itself, or None if they are outside the space."""
        training = base.training
        parameters: dict[str, Any] = {"learning_rate": training.learning_rate}
        for name, values in self.choices.items():
            of = {group_size_in_tokens(v, training.context_length) if name == "group_size" else v: v for v in values}
            parameters[name] = of.get(getattr(training, name))
        return parameters if self.holds(parameters) else None

    def holds(self, parameters: dict[str, Any]) -> bool:
        """Whether these parameters are in the space."""
        low, high = self.rates
        return (
            parameters.keys() == {"learning_rate", *self.choices}
            and low <= parameters["learning_rate"] <= high
            and all(parameters[name] in values for name, values in self.choices.items())
        )

    def rounded(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """With the learning rate rounded, inside its range."""
        low, high = self.rates
        return parameters | {"learning_rate": min(max(_rounded(parameters["learning_rate"]), low), high)}


class Study:
    """The search for the best setting of one method at one context length, with one combination of the axes' values.

    Attributes:
        suggested: the parameters of its suggestions by the trials' fingerprints, in order.
        exhausted: it has suggested every setting of its space.
    """

    def __init__(self, spec: SweepSpec, base: TrialSpec, storage: Storage) -> None:
        self.spec, self.base, self.storage = spec, base, storage
        self.name = base.label
        self.space = Space.of(spec, base)
        self.suggested: dict[str, dict[str, Any]] = {}
        self.records: dict[str, TrialRecord] = {}
        self.exhausted = False

    @property
    def to_come(self) -> int:
        """The number of suggestions still to be made."""
        return 0 if self.exhausted else max(0, self.spec.search_trials - len(self.suggested))

    def take(self, made: Suggested) -> TrialSpec | None:
        """Takes up a recorded suggestion; returns its trial.

        None if it belongs to another study, or to another sweep of the same name.
        """
        if made.study != self.name or not self.space.holds(made.parameters):
            return None
        trial = self.space.trial(self.base, made.parameters)
        if trial.fingerprint != made.fingerprint or trial.fingerprint in self.suggested:
            return None
        self.suggested[trial.fingerprint] = made.parameters
        return trial

    def suggest(self) -> Suggested | None:
        """The next suggestion, new to the study; None if none is left."""
        for parameters in self._candidates():
            fingerprint = self.space.trial(self.base, parameters).fingerprint
            if fingerprint not in self.suggested:
                number = len(self.suggested)
                return Suggested(study=self.name, number=number, parameters=parameters, fingerprint=fingerprint)
        self.exhausted = True
        return None

    def _candidates(self) -> Iterator[dict[str, Any]]:
        import optuna

        own = self.space.own(self.base)
        if own and not self.suggested:
            yield own
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = self.space.distributions()
        history = self._history(distributions) if self.spec.search == "optuna" else []
        for draw in range(SAMPLER_DRAWS + RANDOM_DRAWS):
            seed = _seed(self.base.training.seed, self.name, len(self.suggested), draw)
            if self.spec.search == "optuna" and draw < SAMPLER_DRAWS:
                first_random = min(MOST_RANDOM, max(1, self.spec.search_trials // 3))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    # A running trial counts as a bad one, to keep concurrent suggestions apart.
                    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=first_random, constant_liar=True)
            else:
                sampler = optuna.samplers.RandomSampler(seed=seed)
            study = optuna.create_study(sampler=sampler)
            study.add_trials(history)
            yield self.space.rounded(study.ask(distributions).params)

    def _history(self, distributions: dict[str, BaseDistribution]) -> list[FrozenTrial]:
        """The outcome of each suggestion so far, as Optuna's trials."""
        from optuna.trial import create_trial

        return [
            create_trial(params=parameters, distributions=distributions, **self._outcome(fingerprint))
            for fingerprint, parameters in self.suggested.items()
        ]

    def _outcome(self, fingerprint: str) -> dict[str, Any]:
        from optuna.trial import TrialState

        record = self.records.setdefault(fingerprint, TrialRecord(self.storage.trial(fingerprint).journal))
        record.follow()
        curve = record.curve(self.base.training.context_length)
        match record.state:
            case "finished":
                last = curve[-1].perplexity
                return {"state": TrialState.COMPLETE, "value": math.inf if math.isnan(last) else last}
            case "stopped":
                return {
                    "state": TrialState.PRUNED,
                    "intermediate_values": {curve[-1].step: curve[-1].perplexity},
                }
            case "failed" if (record.reason or "").startswith(DIVERGED):
                return {"state": TrialState.COMPLETE, "value": math.inf}
            case "failed" | "cancelled":
                return {"state": TrialState.FAIL}
        return {"state": TrialState.RUNNING}


class Search:
    """All studies of a sweep, and the journal that they are rebuilt from.

    Args:
        bases: the sweep's trials as without a search, one for each study.
        journal: the search's own, ``search.jsonl``.
    """

    def __init__(
        self, spec: SweepSpec, bases: list[TrialSpec], storage: Storage, journal: Journal | SegmentedJournal
    ) -> None:
        self.studies = [Study(spec, base, storage) for base in bases]
        self.journal = journal
        # In the order of suggestion.
        made = [event for event in journal.read().events if isinstance(event, Suggested)]
        self.trials = [trial for each in made for study in self.studies if (trial := study.take(each))]

    def begin(self) -> None:
        """Suggests the first trial of each study that has none."""
        for study in self.studies:
            if not study.suggested:
                self._add(study)

    def next(self) -> TrialSpec | None:
        """Suggests and records a trial of the study with the fewest; None once all are made."""
        while waiting := [study for study in self.studies if study.to_come]:
            study = min(waiting, key=lambda s: (len(s.suggested), -s.base.training.context_length))
            if trial := self._add(study):
                return trial
        return None

    @property
    def to_come(self) -> int:
        """The number of suggestions still to be made."""
        return sum(study.to_come for study in self.studies)

    @property
    def tokens_to_come(self) -> int:
        """Tokens that the trials still to be suggested would train on."""
        configs = [(study.to_come, study.base.training) for study in self.studies]
        return sum(n * training.steps * training.batch * training.context_length for n, training in configs)

    def _add(self, study: Study) -> TrialSpec | None:
        suggested = study.suggest()
        if suggested is None:
            return None
        self.journal.append(suggested)
        trial = study.take(suggested)
        if trial is not None:
            self.trials.append(trial)
        return trial


def _rounded(rate: float) -> float:
    return float(f"{rate:.{SIGNIFICANT_DIGITS - 1}e}")


def _short(value: float) -> str:
    """``3e-3`` for 0.003, ``3.12e-4`` for 0.000312; whole numbers as they are."""
    if isinstance(value, int):
        return str(value)
    mantissa, exponent = f"{value:.5e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _seed(*what: Any) -> int:
    """A seed from the arguments, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big")
