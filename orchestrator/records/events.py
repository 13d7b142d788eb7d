"""The events of a trial's journal, one class each, and the only writer and parser of their lines.

A line is a JSON object with ``event``, ``time`` (Unix seconds), ``version`` and the event's own fields. Fields and
events that a newer longspan has added are kept, and values renamed since are mapped on reading (``RENAMED``). A line
that cannot be read is skipped and reported.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import types
import typing
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from workloads.evaluation.intervals import DocumentScores
from workloads.files.journal_lines import parse_line
from workloads.files.json_text import json_text

# 1: lines without a version (up to b1875aa).
VERSION = 2

FaultKind = Literal[
    "configuration", "not_finite", "disk_full", "error", "out_of_memory", "out_of_host_memory", "transient", "lost",
    "preempted",
]  # fmt: skip

# Whole numbers must be below this: no count of ours is larger, and a float could not hold it.
MAX_INTEGER = 2**63

# Values that older journals have under another name, by event and field.
_FAULT_KINDS = {"hiccup": "transient"}
RENAMED: dict[str, dict[str, dict[str, str]]] = {"failed": {"kind": _FAULT_KINDS}, "retry": {"kind": _FAULT_KINDS}}

# The longest time between two lines of different processes, or of an older journal, that is believed: 6 hours.
MAX_GAP_S = 6 * 3600.0

EVENTS: dict[str, type[Event]] = {}


def _omitted_if_none() -> Any:
    """A field that is None by default, and then left out of the line."""
    return field(default=None, metadata={"optional": True})


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a trial.

    Args:
        time: when, in Unix seconds.
        version: of the format of its line.
        process: of the worker or driver that wrote it; None for other writers, and in older journals.
        boot: of the machine that it ran on; None in older journals.
        uptime: seconds on the monotonic clock of that process, which all processes of one boot share.
        extra: fields that this version of longspan does not know.
    """

    line_name: ClassVar[str]

    time: float = field(default_factory=time.time)
    version: int = VERSION
    process: str | None = _omitted_if_none()
    boot: str | None = _omitted_if_none()
    uptime: float | None = _omitted_if_none()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name in EVENTS:
            raise TypeError(f"two events are called {name!r}")
        if name is not None:
            cls.line_name = name
            EVENTS[name] = cls

    @property
    def name(self) -> str:
        """The value of ``event`` in its line."""
        return self.line_name

    def has_clock_of(self, other: Event) -> bool:
        """Whether both carry the monotonic clock of one process, or of one boot of a machine."""
        one_process = self.process is not None and self.process == other.process
        one_boot = self.boot is not None and self.boot == other.boot
        return (one_process or one_boot) and None not in (self.uptime, other.uptime)


@dataclass(frozen=True, kw_only=True)
class Launched(Event, name="launched"):
    """Tune has started the trial's driver for a sweep. ``resources``: workers, and the cpus and gpus of each."""

    sweep: str | None = None
    resources: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Started(Event, name="started"):
    """A worker has begun an attempt: what it runs on, from which code, and how.

    Args:
        devices: GPUs, or threads of CPUs, of all workers together.
        machine_devices: all that worker 0's machine has for trials, in use or idle; None in older journals.
        usd_per_device_hour, price_source: None where the price is not known.
        head_usd_per_hour: of a head that trains nothing; None without one.
        drive: id of the job that started it, the same across restarts of the driver's process.
        execution: settings of ExecutionConfig; gradient_checkpointing and offload_activations are numbers of layers.
    """

    host: str | None = None
    pid: int | None = None
    workers: int = 1
    hardware: str | None = None
    cpus: int | None = None
    memory_gib: float | None = None
    platform: str | None = None
    python: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    device: Literal["gpu", "cpu"] | None = None
    devices: int | None = None
    device_name: str | None = None
    device_memory_gib: float | None = _omitted_if_none()
    compute_capability: str | None = _omitted_if_none()
    driver: str | None = _omitted_if_none()
    cuda: str | None = _omitted_if_none()
    allocator: str | None = _omitted_if_none()
    machine_devices: float | None = _omitted_if_none()
    usd_per_device_hour: float | None = None
    price_source: str | None = None
    head_usd_per_hour: float | None = _omitted_if_none()
    sweep: str | None = None
    drive: str | None = None
    node: str | None = None
    placement_group: str | None = None
    git_commit: str | None = None
    git_diff: str | None = None
    execution: dict[str, Any] = field(default_factory=dict)

    @property
    def num_devices(self) -> int:
        """GPUs or CPU threads; of a journal that does not say, workers."""
        return self.devices or self.workers


@dataclass(frozen=True, kw_only=True)
class ModelReady(Event, name="model"):
    """The model is loaded and set up. ``compiled_layers``: whether its layers are compiled."""

    parameters: int
    trainable_parameters: int
    attention_backend: str | None = _omitted_if_none()
    compiled_layers: bool | None = _omitted_if_none()


@dataclass(frozen=True, kw_only=True)
class Resumed(Event, name="resume"):
    """Training continues from the checkpoint of this step."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Step(Event, name="step"):
    """An optimiser step. ``tokens``: trained on by then; ``mfu``: on GPUs that workloads/budget/devices.py knows."""

    step: int
    tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    peak_memory_gib: float
    mfu: float | None = _omitted_if_none()


@dataclass(frozen=True, kw_only=True)
class Eval(Event, name="eval"):
    """An evaluation at one context length. ``nll`` (nats) and ``num_tokens`` have one entry a document."""

    step: int
    tokens: int
    context_length: int
    perplexity: float
    nll: list[float]
    num_tokens: list[int]

    def __post_init__(self) -> None:
        if len(self.nll) != len(self.num_tokens):
            raise ValueError(f"eval with {len(self.nll)} scores of {len(self.num_tokens)} documents")

    @property
    def scores(self) -> DocumentScores:
        """What was scored, by document."""
        return DocumentScores(np.array(self.nll), np.array(self.num_tokens))


@dataclass(frozen=True, kw_only=True)
class Saved(Event, name="saved"):
    """The checkpoint of this step is whole."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Finished(Event, name="finished"):
    """The trial is complete."""


@dataclass(frozen=True, kw_only=True)
class Stopped(Event, name="stopped"):
    """Stopped early (orchestrator/planning/early_stopping.py): unfinished, and can continue from its checkpoint.

    Args:
        sweep: the one whose rule stopped it.
        rung: the tokens at which it was compared.
        compared_with: the other trials' scores there, by fingerprint.
    """

    step: int
    sweep: str
    reason: str
    tokens: int | None = None
    rule: str | None = None
    rung: int | None = None
    score: float | None = None
    cutoff: float | None = None
    compared_with: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Failed(Event, name="failed"):
    """An attempt has ended in an error."""

    reason: str
    kind: FaultKind = "error"
    attempt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Retry(Event, name="retry"):
    """The trial is tried again in ``pause`` seconds; ``remedy`` says what is different then."""

    kind: FaultKind
    remedy: str
    pause: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Preempted(Event, name="preempted"):
    """The node is being preempted: stopped with a checkpoint, continues elsewhere."""

    attempt: str


@dataclass(frozen=True, kw_only=True)
class Cancelled(Event, name="cancelled"):
    """Cancelled by a user (orchestrator/cancel.py): stopped with a checkpoint, or not begun; can continue."""

    step: int
    by: str


@dataclass(frozen=True, kw_only=True)
class Suggested(Event, name="suggested"):
    """A search has suggested a trial; in the search's own journal (orchestrator/planning/search.py)."""

    study: str
    number: int
    parameters: dict[str, Any]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Unknown(Event):
    """An event that this version of longspan does not know, with all its fields in ``extra``."""

    unknown_name: str

    @property
    def name(self) -> str:
        """The value of ``event`` in its line."""
        return self.unknown_name


class Skipped(NamedTuple):
    """A line that could not be read, and why."""

    line: bytes
    reason: str

    @property
    def is_cut_off(self) -> bool:
        """Whether it is the beginning of a line that a killed process left, which loses nothing that was reported."""
        return self.line.startswith(b'{"event": ') and not self.line.endswith(b"}")


class Parsed(NamedTuple):
    """The events of some lines, and the lines that were skipped."""

    events: list[Event]
    skipped: list[Skipped]


# Names this process in the lines of its journal.
_PROCESS = uuid.uuid4().hex[:8]
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def stamp(event: Event) -> Event:
    """The event with this process's monotonic clock: wall clocks may be set while it runs."""
    return dataclasses.replace(event, process=_PROCESS, boot=_boot(), uptime=round(time.monotonic(), 3))


@functools.cache
def _boot() -> str | None:
    """Names this run of the operating system; None where it has no such name."""
    try:
        return _BOOT_ID.read_text("utf-8")[:8]
    except OSError:
        return None


def seconds_between(earlier: Event, later: Event) -> float:
    """The time between two lines of a journal that follow each other; never negative.

    Exact between lines of one process, or of one boot. Between others the wall clocks count, up to ``MAX_GAP_S``.
    """
    if earlier.has_clock_of(later):
        return max(0.0, (later.uptime or 0.0) - (earlier.uptime or 0.0))
    return max(0.0, min(later.time - earlier.time, MAX_GAP_S))


def precedes(one: Event, other: Event) -> bool:
    """Whether ``one`` was written before ``other``, of any journal: by their monotonic clock if they share it."""
    if one.has_clock_of(other):
        return (one.uptime or 0.0) <= (other.uptime or 0.0)
    return one.time <= other.time


def make_event(name: str, **fields: Any) -> Event:
    """The event of this name.

    Raises:
        TypeError: it lacks a field, or there is no such event or field.
    """
    if name not in EVENTS:
        raise TypeError(f"no event is called {name!r}; expected one of {', '.join(EVENTS)}")
    return EVENTS[name](**fields)


def as_line(event: Event) -> str:
    """The event as a line of a journal."""
    values = {"event": event.name}
    for name, is_optional in _fields(event.name).items():
        value = getattr(event, name)
        if not (is_optional and value is None):
            values[name] = value
    return json_text({**values, **event.extra}) + "\n"


def parse(content: bytes) -> Parsed:
    """The events of whole lines. A line that a dying process cut off, or that is damaged, is skipped."""
    events, skipped = [], []
    for line in content.splitlines():
        if not line.strip():
            continue
        try:
            events.append(_make_event(parse_line(line)))
        except (ValueError, TypeError) as error:
            skipped.append(Skipped(line, str(error)))
    return Parsed(events, skipped)


def _make_event(values: dict[str, Any]) -> Event:
    """The event of a line. Consumes ``values`` (pops its keys).

    Raises:
        TypeError, ValueError: it lacks fields, or has values of other types.
    """
    name = values.pop("event")
    cls = EVENTS.get(name, Unknown)
    for renamed, new_values in RENAMED.get(name, {}).items():
        if renamed in values:
            values[renamed] = new_values.get(values[renamed], values[renamed])
    values.setdefault("version", 1)
    for field_name, fits in _field_types(name).items():
        if field_name in values and not fits(values[field_name]):
            raise ValueError(f"{name!r} with the {field_name} {str(values[field_name])[:40]!r}")
    if unknown := values.keys() - _fields(name).keys():
        values["extra"] = {each: values.pop(each) for each in unknown}
    return Unknown(unknown_name=name, **values) if cls is Unknown else cls(**values)


@functools.cache
def _fields(name: str) -> dict[str, bool]:
    """The fields of a line of this name, and whether each is left out where it is None."""
    fields = {each.name: each for each in dataclasses.fields(EVENTS.get(name, Unknown))}
    inside = fields.keys() - {"extra", "unknown_name"}
    return {name: "optional" in each.metadata for name, each in fields.items() if name in inside}


@functools.cache
def _field_types(name: str) -> dict[str, Callable[[Any], bool]]:
    """For each field of a line of this name, whether a value is of the type that the event declares."""
    hints = typing.get_type_hints(EVENTS.get(name, Unknown))
    return {each: _type_check(hints[each]) for each in _fields(name)}


def _type_check(hint: Any) -> Callable[[Any], bool]:
    """Whether a value read from JSON is of a declared type. Of literals only the type counts: others may be newer."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return lambda value: True
    if origin in (types.UnionType, typing.Union):
        checks = [_type_check(each) for each in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is Literal:
        return lambda value: isinstance(value, type(arguments[0]))
    if origin is list:
        element = _type_check(arguments[0])
        return lambda value: isinstance(value, list) and all(map(element, value))
    if origin is dict:
        element = _type_check(arguments[1])
        return lambda value: isinstance(value, dict) and all(map(element, value.values()))
    if hint is float:
        return lambda value: isinstance(value, float) or _is_whole_number(value)
    if hint is int:
        return _is_whole_number
    return lambda value: isinstance(value, hint)


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_INTEGER
