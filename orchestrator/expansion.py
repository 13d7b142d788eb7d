"""The trials of a sweep: every context length with every method, seed and axis value, and the untuned references."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.axes import as_text, distinction, flag, in_words
from orchestrator.learning_rates import Rule
from orchestrator.spec import EXTRA_RATES, SweepSpec, extra_rates
from orchestrator.trial_spec import Identities, TrialSpec
from workloads.attention.patterns import PATTERNS
from workloads.config import OF_LORA, Precision, TrainingConfig, TrainingFields, group_size_in_tokens
from workloads.errors import InputError

# The shared fields that an untuned trial has too.
OF_UNTUNED = ("eval_documents", "task")
RATE_OF = {
    "lora": "learning_rate_lora", "lora+norm": "learning_rate_lora", "lora+embed": "learning_rate_lora_plus",
    "lora+": "learning_rate_lora_plus", "full": "learning_rate_full",
}  # fmt: skip

# A context length, a method and a value of each axis, by field.
Combination = dict[str, Any]


@dataclass(frozen=True)
class Expansion:
    """The trials of a sweep, and the combinations that it leaves out.

    Args:
        trials: by context length, untuned ones first; each once.
        left_out: one sentence for each reason for which combinations of the axes' values cannot be, and for each rule
            for learning rates that no trial matches.
    """

    trials: list[TrialSpec]
    left_out: list[str]


def expand(spec: SweepSpec, identities: Identities, precision: Precision) -> Expansion:
    """The trials of a sweep, and the combinations of axes that cannot be.

    If there are references, the untuned models that the tuned ones start from are always among them: they take
    seconds, and their score is step 0 of every tuned trial.

    Raises:
        InputError: a setting that no trial can have, such as a context that is not a multiple of the group size; or an
            axis without effect.
    """
    found: dict[str, TrialSpec] = {}
    made: list[tuple[Combination, str]] = []  # with the fingerprint of its trial
    impossible: dict[str, list[Combination]] = defaultdict(list)  # by reason

    def add(config: TrainingConfig, named: str = "") -> str:
        trial = TrialSpec(
            model=spec.model, data=spec.data, text_column=spec.text_column, eval_data=spec.eval_data,
            identities=identities, training=config, distinction=named,
        )  # fmt: skip
        return found.setdefault(trial.fingerprint, trial).fingerprint

    for context_length in spec.context_lengths:
        for config in _untuned(spec, context_length, precision):
            add(config)
        for method, *values in itertools.product(spec.methods, *spec.axes.values()):
            combination = {
                "context_length": context_length,
                "method": method,
                **dict(zip(spec.axes, values, strict=True)),
            }
            try:
                configs = list(_tuned(spec, combination, precision))
            except InputError as error:
                if not spec.axes:
                    raise
                impossible[str(error)].append(combination)
            else:
                made += [(combination, add(config, _distinction(spec, config))) for config in configs]
    _refuse_without_trials([combination for combination, _ in made], impossible)
    _refuse_without_effect(spec, made)
    left_out = [_describe_left_out(spec, combinations, reason) for reason, combinations in impossible.items()]
    unused = _unused_rules(spec, [_settings(spec, combination) for combination, _ in made])
    return Expansion(list(found.values()), [*left_out, *unused])


def _untuned(spec: SweepSpec, context_length: int, precision: Precision) -> list[TrainingConfig]:
    positions = dict.fromkeys((*spec.references, *spec.values_of("positions"))) if spec.references else ()
    return [
        TrainingConfig(
            method="untuned",
            context_length=context_length,
            attention="full",
            positions=each,
            precision=precision,
            eval_span=_eval_span(spec, context_length),
            **{name: getattr(spec, name) for name in OF_UNTUNED},
        )
        for each in positions
    ]


def _tuned(spec: SweepSpec, combination: Combination, precision: Precision) -> Iterator[TrainingConfig]:
    """The trials of a combination: one for each multiple of its learning rates and each seed."""
    settings = _settings(spec, combination)
    context_length, group_size = settings["context_length"], settings.get("group_size")
    in_tokens = {} if group_size is None else {"group_size": group_size_in_tokens(group_size, context_length)}
    eval_span = _eval_span(spec, context_length)
    for multiple, seed in itertools.product(spec.learning_rate_sweep, spec.seeds):
        rates = _learning_rates(spec, settings, multiple)
        yield TrainingConfig(**settings | in_tokens | rates, seed=seed, precision=precision, eval_span=eval_span)


def _settings(spec: SweepSpec, combination: Combination) -> dict[str, Any]:
    """A combination with all other fields that have an effect on it."""
    names = [each.name for each in dataclasses.fields(TrainingFields) if each.name not in EXTRA_RATES]
    settings = {name: getattr(spec, name) for name in (*names, "group_size", "steps", *EXTRA_RATES)} | combination
    unused: tuple[str, ...] = OF_LORA if settings["method"] == "full" else ()
    if not PATTERNS[settings["attention"]].has_group_size:
        unused += ("group_size",)
    unused += tuple(set(EXTRA_RATES) - extra_rates(settings["method"], settings["train_layers"]))
    return {name: value for name, value in settings.items() if name not in unused}


def _learning_rates(spec: SweepSpec, settings: Mapping[str, Any], multiple: float) -> dict[str, float | None]:
    """The learning rates of what a trial trains, by TrainingConfig's fields.

    All are scaled by ``multiple``, one of ``learning_rate_sweep``, so that their ratio stays.
    """
    matching = [rule.rate for rule in _rules(spec) if rule.matches(settings)]
    rates = {"learning_rate": matching[-1] if matching else getattr(spec, RATE_OF[settings["method"]])}
    rates |= {name: settings[name] for name in EXTRA_RATES if name in settings}
    if multiple != 1:
        # Rounded, so that 0.3 x 2e-5 is the same trial as 6e-6.
        rates = {name: rate and float(f"{rate * multiple:.12g}") for name, rate in rates.items()}
    return rates


def _rules(spec: SweepSpec) -> list[Rule]:
    return [Rule.parse(text) for text in spec.learning_rate_for]


def _distinction(spec: SweepSpec, config: TrainingConfig) -> str:
    named = distinction(config, spec.axes)
    rate = f"lr {config.learning_rate:g}" if spec.learning_rate_sweep != (1.0,) else ""
    return f"{named} {rate}".strip()


def _eval_span(spec: SweepSpec, context_length: int) -> int:
    if spec.task == "sft":  # examples are scored whole
        return context_length
    return spec.eval_span or max(spec.context_lengths)


def _refuse_without_trials(made: Sequence[Combination], impossible: Mapping[str, list[Combination]]) -> None:
    """Raises InputError if no combination with one of the given values can be."""
    for reason, combinations in impossible.items():
        if not made:
            raise InputError(reason)
        for name, value in (item for combination in combinations for item in combination.items()):
            if not any(each[name] == value for each in made):
                raise InputError(f"nothing can be trained with {name.replace('_', ' ')} {as_text(value)}: {reason}")


def _refuse_without_effect(spec: SweepSpec, made: Sequence[tuple[Combination, str]]) -> None:
    """Raises InputError if all values of an axis give the same trials."""
    for name, values in spec.axes.items():
        trials = [{fingerprint for each, fingerprint in made if each[name] == value} for value in values]
        if all(each == trials[0] for each in trials):
            raise InputError(
                f"{flag(name)} {in_words(values)} has no effect: every value gives the same trials. "
                "Leave it out, or give one value"
            )


def _describe_left_out(spec: SweepSpec, combinations: Sequence[Combination], reason: str) -> str:
    """One sentence on combinations that cannot be, all for the same reason, by what they have in common."""
    first, *others = combinations
    fixed = {
        name
        for name, values in (("context_length", spec.context_lengths), ("method", spec.methods))
        if len(values) == 1
    }
    common = {
        name: value
        for name, value in first.items()
        if name not in fixed and all(each[name] == value for each in others)
    }
    named = " with ".join(f"{name.replace('_', ' ')} {as_text(value)}" for name, value in common.items())
    return f"{named or f'{len(combinations)} combinations'} left out: {reason}"


def _unused_rules(spec: SweepSpec, settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One sentence for each rule for learning rates that no trial matches, as after ``--positions linear``."""
    for rule in _rules(spec):
        if not any(rule.matches(each) for each in settings):
            given = {
                name: dict.fromkeys(as_text(each[name]) for each in settings if name in each) for name in rule.values
            }
            has = "; ".join(f"{name} {', '.join(values) or 'in none'}" for name, values in given.items())
            yield f"{flag('learning_rate_for')} {rule.text} matches no trial; trials have {has}"
