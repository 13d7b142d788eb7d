"""What the report is made from: a comparison of trials, as plain data.

The orchestrator computes it from the trials' journals and stores it as JSON; this room only draws it. The classes below
are the contract, and `check` holds a comparison to it: every key is required, except that one whose type allows None
may be left out and is then None.
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
    """A model that was not trained at all, scored by the same rule."""

    label: str
    perplexity: float
    low: float | None
    high: float | None


class OriginalLength(TypedDict):
    """Perplexity at the length the model was pretrained for: what the longer context cost there."""

    context_length: int
    before: float | None  # of the unchanged model, where the sweep has it among its references
    after: float


class Gap(TypedDict):
    """Perplexity above full fine-tuning's, in percent; the interval is paired over documents."""

    percent: float
    low: float | None
    high: float | None
    as_good_from_step: int | None  # from which on it stays within the comparison's `as_good` of full fine-tuning


class GapPoint(TypedDict):
    """Perplexity above the baseline's after some training, in percent; over seeds and documents, paired."""

    step: int
    tokens: int
    percent: float
    low: float | None
    high: float | None


class Gaps(TypedDict):
    """One method's best setting against another's, at every evaluation that both have but step 0."""

    method: str
    baseline: str
    seeds: list[int]  # that both finished and are paired; empty where they share none
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


class Setting(TypedDict):
    """Finished trials that differ in nothing but their seed, taken together."""

    method: str
    learning_rate: float
    fingerprint: str  # of its first trial
    chosen: bool  # the best of its method: the one that stands for it
    seeds: list[int]
    final: Point
    hours: float | None  # of training steps, in the context's unit; the mean over seeds
    usd: float | None
    dominated: bool | None  # another setting is at least as good for no more hours
    reached: Reached | None
    as_good_from_step: int | None


class Trial(TypedDict):
    method: str
    fingerprint: str
    # stopped: early, by the sweep itself; cancelled: by a person
    state: Literal["finished", "unfinished", "failed", "stopped", "cancelled"]
    reason: str | None
    last_step: int | None
    log: str | None
    learning_rate: float | None
    trainable_parameters: int | None
    seed: int | None
    chosen: bool  # of its method's best setting
    curve: list[Point]
    final: Point | None
    original_length: OriginalLength | None
    gap_to_full: Gap | None
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
    hours_unit: str | None  # GPU hours, CPU hours; None where the trials' hours cannot be compared
    winner: str | None
    sentences: list[str]


class Model(TypedDict):
    name: str
    original_context_length: int
    parameters: int | None  # None where no model was ever loaded
    identity: str


class Data(TypedDict):
    name: str
    identity: str
    validation_documents: int
    scored_tokens: int


class Comparison(TypedDict):
    sweep: str
    created: str
    longspan_version: str
    question: str
    sentences: list[str]
    rule: str
    model: Model
    data: Data
    attention: str
    shared_settings: dict[str, str] | None  # in words, by name: what all trials were trained with
    seeds: list[int]
    confidence: float
    as_good: float  # the share above full fine-tuning's perplexity that counts as as good
    learning_rates_chosen: str
    hardware: str
    driver: str | None
    price: str | None  # of a device's hour: where it comes from
    packages: dict[str, str]
    git_commit: str | None
    git_diff: str | None  # the file that holds what the code differs in from the commit
    wall_seconds: float | None
    peak_memory_gib: float | None
    storage: str
    mlflow_command: str
    contexts: list[Context]


def check(value: Any, kind: Any = Comparison, where: str = "comparison") -> Any:
    """Returns `value` with absent optional keys set to None.

    Raises ValueError that names the place, such as `comparison.contexts[0].trials[2].final`, what is wrong, and
    what was expected there.
    """
    if isinstance(kind, UnionType):
        (kind,) = (option for option in get_args(kind) if option is not type(None))
        return None if value is None else check(value, kind, where)
    if is_typeddict(kind):
        _expect(isinstance(value, dict), where, value, "an object")
        kinds = get_type_hints(kind)
        missing = [key for key in kinds if key not in value and not isinstance(kinds[key], UnionType)]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}; it has {', '.join(map(repr, value))}")
        return {key: check(value.get(key), kinds[key], f"{where}.{key}") for key in kinds}
    if get_origin(kind) is list:
        _expect(isinstance(value, list), where, value, "a list")
        return [check(item, get_args(kind)[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if get_origin(kind) is dict:
        _expect(isinstance(value, dict), where, value, "an object")
        return {key: check(item, get_args(kind)[1], f"{where}[{key!r}]") for key, item in value.items()}
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
