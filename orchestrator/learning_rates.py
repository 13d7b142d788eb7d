"""Learning rates by rules: ``positions=yarn:1e-3``, ``method=lora+,positions=yarn:3e-3``.

A rule gives the learning rate of the trials that have all of its values. Where several match, the last one holds, so
general rules come first. What no rule matches has its method's own learning rate.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from orchestrator.axes import AXES, LISTS, as_text
from orchestrator.field_help import read_value
from workloads.config import TrainingConfig, trained_layers
from workloads.errors import InputError

# What a rule may name.
CONDITIONS = ("method", "context_length", *AXES)
TYPES = get_type_hints(TrainingConfig) | {"group_size": float}  # a share in a sweep, tokens in a trial
FLAG = "--learning-rate-for"


@dataclass(frozen=True)
class Rule:
    """The learning rate of the trials that have certain values."""

    text: str
    values: Mapping[str, str]
    rate: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """A rule from its text.

        Raises:
            InputError: it has another form, names an unknown field or value, or its rate is not a positive number.
        """
        conditions, _, rate = text.rpartition(":")
        values: dict[str, str] = {}
        # A comma may also be part of a value, such as the layers 0,5,11.
        for condition in re.split(r",\s*(?=\w+=)", conditions.strip()):
            field, equals, value = condition.partition("=")
            if not equals or not value.strip():
                raise InputError(
                    f"{FLAG} {text}: expected FIELD=VALUE:RATE, such as positions=yarn:1e-3 or "
                    "method=lora+,positions=yarn:3e-3"
                )
            if field not in CONDITIONS:
                raise InputError(
                    f"{FLAG} {text}: the field {field!r} is unknown; expected one of {', '.join(CONDITIONS)}"
                )
            if field in values:
                raise InputError(f"{FLAG} {text}: {field} is given twice; expected each field once")
            values[field] = value.strip()
            _check_value(text, field, values[field])
        try:
            number = float(rate)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise InputError(f"{FLAG} {text}: the rate is {rate.strip() or 'missing'!r}; expected a positive number")
        return cls(text, values, number)

    def matches(self, setting: Mapping[str, Any]) -> bool:
        """Whether a trial has all of the rule's values; ``setting`` has them by field, as the sweep gives them."""
        return all(field in setting and _is(setting[field], value) for field, value in self.values.items())


def _check_value(rule: str, field: str, text: str) -> None:
    """Raises InputError if the field can never have this value; values are spelled as in flags."""
    try:
        if field == "train_layers":
            trained_layers(text, sys.maxsize)
        elif TYPES[field] is bool:
            read_value({"true": True, "false": False}.get(text.lower(), text), bool)
        elif field not in LISTS:
            read_value(text, TYPES[field])
    except InputError as error:
        problem = str(error).removeprefix(f"{field} is ")
        raise InputError(f"{FLAG} {rule}: {field} is {problem}") from error


def _is(value: Any, text: str) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return value == float(text)
        except ValueError:
            return False
    return as_text(value).lower() == text.lower()
