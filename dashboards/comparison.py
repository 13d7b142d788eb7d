"""What the report is made from: a comparison of trials, as plain data.

The orchestrator computes it from the trials' journals and stores it as JSON; this package only draws it. The classes
below are the contract, and `check` enforces it: every key is required, except that one whose type allows None may be
left out and is then None. Labels come with it; in an older comparison without them, `check` sets them to raw names.
"""

from types import UnionType
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints, is_typeddict


class Point(TypedDict):
    """Perplexity after some training, with its confidence interval."""

    step: int
    tokens: int
    perplexity: float
    low: float | None
    high: float | None


class Reference(TypedDict):
    """An untuned model, scored by the same rule."""

    label: str
    perplexity: float
    low: float | None
    high: float | None


class OriginalLength(TypedDict):
    """Perplexity at the length the model was pretrained for: what the longer context cost there."""

    context_length: int
    before: float | None  # of the unchanged model, if it is one of the sweep's references
    after: float


class Gap(TypedDict):
    """Perplexity above the baseline's, in percent; the interval is paired over documents, and seeds if several."""

    percent: float
    low: float | None
    high: float | None
    as_good_from_step: int | None  # from which it stays within the comparison's `as_good` of the baseline


class GapPoint(TypedDict):
    """Perplexity above the baseline's after some training, in percent, paired over seeds and documents."""

    step: int
    tokens: int
    percent: float
    low: float | None
    high: float | None


class Gaps(TypedDict):
    """One variant's best setting against another's, at every evaluation that both have except step 0."""

    method: str  # the variant's id, which without axes is the method
    baseline: str  # likewise
    seeds: list[int]  # that both finished, paired; empty if they share none
    points: list[GapPoint]


class Target(TypedDict):
    """The perplexity whose cost is compared."""

    perplexity: float
    source: str


class Reached(TypedDict):
    """What it took to reach the target for the first time, interpolated between two evaluations."""

    step: float
    tokens: float
    hours: float | None
    usd: float | None


class Difference(TypedDict):
    """A perplexity above another, in percent, paired over documents, and seeds if both have several."""

    percent: float
    low: float | None
    high: float | None


class AgainstUntuned(Difference):
    """The best trained variant against the best untuned model; negative: the trained one is better."""

    variant: str
    reference: str  # its label


class Effect(TypedDict):
    """What a value of an axis changes against the axis' first, everything else held.

    The mean difference in log perplexity over all pairs of variants that differ in this axis alone, in percent, paired
    over documents and seeds. The interval covers these, not other settings.
    """

    axis: str  # a field of the training's configuration, or method
    label: str
    value: str
    against: str
    percent: float
    low: float | None
    high: float | None
    seeds: list[int]  # that all of the pairs finished
    matched: list[list[str]]  # the pairs, as ids of variants


class Setting(TypedDict):
    """Finished trials that differ only in their seed, taken together."""

    method: str
    variant: str | None  # its id: the method and the values of the axes; without axes the method
    name: str | None  # what the report calls it: the variant's label and what tells it from others of the variant
    learning_rate: float
    fingerprint: str  # of its first trial
    chosen: bool  # the best of its variant, which represents it
    seeds: list[int]
    final: Point
    hours: float | None  # of training steps, in the context's unit; the mean over seeds
    usd: float | None
    dominated: bool | None  # another setting is at least as good for no more hours
    dominated_by: str | None  # the name of the best such setting
    reached: Reached | None
    as_good_from_step: int | None
    gap: Gap | None  # to the baseline, over the seeds that both finished
    above_lowest: Difference | None  # of a variant's best setting, to that of the variant with the lowest perplexity
    against_untuned: Difference | None  # of a variant's best setting, to the best untuned model


class Trial(TypedDict):
    """A trial, in any state."""

    method: str
    variant: str | None  # as of a setting
    name: str | None  # as of a setting
    label: str | None  # what commands call it, such as lora+ 2048
    fingerprint: str
    # stopped: early, by the sweep itself; cancelled: by a person
    state: Literal["finished", "unfinished", "failed", "stopped", "cancelled"]
    reason: str | None
    last_step: int | None
    log: str | None
    learning_rate: float | None
    trainable_parameters: int | None
    seed: int | None
    chosen: bool  # of its variant's best setting
    curve: list[Point]
    final: Point | None
    original_length: OriginalLength | None
    gap_to_full: Gap | None  # to the trial of the baseline with the same seed; the baseline may be another than full
    tokens_per_second: float | None
    peak_memory_gib: float | None
    train_seconds: float | None
    hours: float | None
    usd: float | None
    mlflow_run_id: str | None


class Context(TypedDict):
    """All trials of one context length."""

    context_length: int
    references: list[Reference]
    trials: list[Trial]
    settings: list[Setting]
    gaps: list[Gaps]
    target: Target | None
    hours_unit: str | None  # GPU hours, CPU hours; None if the trials' hours cannot be compared
    scored_documents: int | None
    baselines: dict[str, str] | None  # of each variant, by ids; without full fine-tuning or a request, the best
    lowest: str | None  # the variant with the lowest perplexity
    not_distinguishable: list[str] | None  # variants whose difference from the lowest the interval does not exclude
    winner: str | None  # the lowest, if every other is distinguishable from it and enough documents are scored
    against_untuned: AgainstUntuned | None
    effects: list[Effect] | None
    sentences: list[str]  # what neither the headline nor a table tells


class Model(TypedDict):
    """The base model."""

    name: str
    original_context_length: int
    parameters: int | None  # None if no model was ever loaded
    identity: str


class Data(TypedDict):
    """The corpus, and what of it was scored."""

    name: str
    identity: str
    validation_documents: int
    scored_tokens: int


class NextStep(TypedDict):
    """A command that goes on from the answer."""

    purpose: str  # export LoRA+ of 2,048 tokens
    command: str


class Comparison(TypedDict):
    """All of it."""

    sweep: str
    created: str
    longspan_version: str
    question: str
    headline: list[str] | None  # the first of the sentences: the best setting at each length, by how much, how surely
    sentences: list[str]
    next_steps: list[NextStep] | None
    rule: str
    model: Model
    data: Data
    attention: str
    shared_settings: dict[str, str] | None  # by label: what all trials were trained with
    method_labels: dict[str, str] | None
    method_descriptions: dict[str, str] | None
    variant_labels: dict[str, str] | None
    axes: dict[str, str] | None  # the label of each field that has several values
    baseline: str | None  # as requested
    cautions: list[str] | None  # those of the sentences that say what follows from few scored documents
    seeds: list[int]
    confidence: float
    as_good: float  # the share above full fine-tuning's perplexity that counts as equally good
    learning_rates_chosen: str
    hardware: str
    driver: str | None
    price: str | None  # source of the price of a device's hour
    packages: dict[str, str]
    git_commit: str | None
    git_diff: str | None  # file with the code's differences from the commit
    wall_seconds: float | None
    peak_memory_gib: float | None
    storage: str
    mlflow_command: str
    contexts: list[Context]


def check(value: Any) -> Any:
    """The comparison with absent optional keys set to None, and absent labels to raw names.

    Raises:
        ValueError: names the place, such as `comparison.contexts[0].trials[2].final`, the problem and the expectation.
    """
    comparison = _check(value, Comparison, "comparison")
    methods = {trial["method"]: None for context in comparison["contexts"] for trial in context["trials"]}
    comparison["method_labels"] = {name: name for name in methods} | (comparison["method_labels"] or {})
    comparison["method_descriptions"] = comparison["method_descriptions"] or {}
    comparison["variant_labels"] = comparison["method_labels"] | (comparison["variant_labels"] or {})
    comparison["axes"] = comparison["axes"] or {}
    comparison["cautions"] = comparison["cautions"] or []
    for context in comparison["contexts"]:
        context["lowest"] = context["lowest"] or context["winner"]
        for key in ("not_distinguishable", "effects"):
            context[key] = context[key] or []
        for one in [*context["trials"], *context["settings"]]:
            one["variant"] = one["variant"] or one["method"]
        for trial in context["trials"]:
            trial["name"] = trial["name"] or trial["label"] or trial["method"]
        for setting in context["settings"]:
            setting["name"] = setting["name"] or f"{setting['method']} lr {setting['learning_rate']:g}"
    return comparison


def _check(value: Any, kind: Any, where: str) -> Any:
    if isinstance(kind, UnionType):
        (kind,) = (option for option in get_args(kind) if option is not type(None))
        return None if value is None else _check(value, kind, where)
    if is_typeddict(kind):
        _expect(isinstance(value, dict), where, value, "an object")
        kinds = get_type_hints(kind)
        missing = [key for key in kinds if key not in value and not isinstance(kinds[key], UnionType)]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}; it has {', '.join(map(repr, value))}")
        return {key: _check(value.get(key), kinds[key], f"{where}.{key}") for key in kinds}
    if get_origin(kind) is list:
        _expect(isinstance(value, list), where, value, "a list")
        return [_check(item, get_args(kind)[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if get_origin(kind) is dict:
        _expect(isinstance(value, dict), where, value, "an object")
        return {key: _check(item, get_args(kind)[1], f"{where}[{key!r}]") for key, item in value.items()}
    if get_origin(kind) is Literal:
        _expect(value in get_args(kind), where, value, f"one of {', '.join(get_args(kind))}")
        return value
    if kind is bool:
        _expect(isinstance(value, bool), where, value, "true or false")
        return value
    allowed = (int, float) if kind is float else kind
    _expect(
        isinstance(value, allowed) and not isinstance(value, bool), where, value, {str: "text"}.get(kind, "a number")
    )
    return value


def _expect(holds: bool, where: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{where} should be {expected}, but is {value!r:.80}")
