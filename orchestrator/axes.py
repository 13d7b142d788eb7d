"""Axes of a sweep: fields of what is trained that have several values, such as ``positions`` linear and yarn.

A sweep's values are plain data: a field with one value has that value, an axis has the list of its values. This form is
that of spec.json, of files and of the Python API; :func:`split` turns it into the typed scalar fields of a
:class:`~orchestrator.spec.SweepSpec` and its ``axes``, and :func:`join` is the inverse.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workloads.config import TrainingConfig, TrainingFields
from workloads.errors import InputError
from workloads.wording import LABELS, has_effect

# These say what is learned and how it is scored: trials that differ in them cannot be compared.
NOT_AXES = ("task", "original_length", "eval_every", "eval_documents")
_OF_TRIALS = (*(field.name for field in dataclasses.fields(TrainingFields)), "group_size", "steps")
# In this order they are in labels, and vary in the list of trials, the first slowest.
AXES = ("positions", *(name for name in _OF_TRIALS if name not in ("positions", *NOT_AXES)))
# A value of these is a list itself, or None.
LISTS = ("lora_targets",)
# What None is called in a label; the other fields are left out of it then.
OF_NONE = {"lora_targets": "default", "max_grad_norm": "none"}


def flag(field: str) -> str:
    """A field as it is given on a command line: ``--group-size``."""
    return f"--{field.replace('_', '-')}"


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """Fields with one value, and axes, of a sweep's values as plain data.

    The first value of an axis is also that of its field.

    Raises:
        InputError: an axis has no value, or one of them twice.
    """
    fields: dict[str, Any] = {}
    axes: dict[str, tuple[Any, ...]] = {}
    for name, value in values.items():
        if name not in AXES:
            fields[name] = tuple(value) if isinstance(value, list) else value
            continue
        several = _lists(value) if name in LISTS else tuple(value) if isinstance(value, list | tuple) else (value,)
        check_values(name, several)
        fields[name] = several[0]
        if len(several) > 1:
            axes[name] = several
    return fields, axes


def join(fields: Mapping[str, Any], axes: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A sweep's values as plain data: a list for each axis."""
    return {name: list(axes[name]) if name in axes else value for name, value in fields.items()}


def check_values(field: str, values: Sequence[Any]) -> None:
    """Raises InputError if a field that takes several values has none, or one of them twice."""
    if not values:
        raise InputError(f"{flag(field)} is empty; expected at least one value")
    if any(value in values[:place] for place, value in enumerate(values)):  # not all can be hashed
        raise InputError(f"{flag(field)} {in_words(values)}: expected each value once")


def _lists(value: Any) -> tuple[tuple[str, ...] | None, ...]:
    """The values of a field in ``LISTS``: a list of plain names is one value; in others each element is one."""
    if value is None or isinstance(value, str):
        return (_names(value),)
    if all(isinstance(each, str) and "," not in each for each in value):
        return (tuple(value),)
    return tuple(_names(each) for each in value)


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None or value == "None":
        return None
    return tuple(name for name in value.split(",") if name) if isinstance(value, str) else tuple(value)


def as_text(value: Any) -> str:
    """A field's value as it is given on a command line: ``yarn``, ``last 4``, ``0.25``, ``q_proj,v_proj``."""
    if isinstance(value, tuple):
        return ",".join(value) + "," * (len(value) < 2)
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def in_words(values: Iterable[Any]) -> str:
    """Several values as they are given on a command line, one after the other."""
    return shlex.join(map(as_text, values))


def distinction(training: TrainingConfig, axes: Iterable[str]) -> str:
    """What sets a trial apart from the others of its method and context length: ``yarn layers last 4 r 32``."""
    words = []
    for name in (axis for axis in axes if has_effect(training, axis)):
        value = getattr(training, name)
        if name == "positions" and value != "none":
            words.append(value)
        elif value is not None or name in OF_NONE:
            words.append(f"{LABELS[name].short or LABELS[name].text.lower()} {_word(name, value)}")
    return " ".join(words)


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(value)
    return OF_NONE[name] if value is None else as_text(value)
