"""The registry of evaluations, and the options of all of them together. Imports neither torch nor transformers.

``perplexity``  held-out documents in windows, scored by two rules
``passkey``     a number hidden in filler text, by length and depth
``topics``      LongChat's topic and line retrieval: its own cases, or generated ones of the same form
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import make_dataclass
from inspect import get_annotations
from typing import Annotated, Literal

import tyro

from workloads.evaluation.options import CommonOptions
from workloads.evaluation.task import EvaluationTask
from workloads.evaluation.tasks.passkey import PASSKEY
from workloads.evaluation.tasks.perplexity import PERPLEXITY
from workloads.evaluation.tasks.topics import TOPICS
from workloads.registry import Registry

TASKS = Registry("evaluation", (PERPLEXITY, PASSKEY, TOPICS))


def options_of(tasks: Mapping[str, EvaluationTask]) -> type[CommonOptions]:
    """A dataclass with the options of these evaluations, which ``tasks`` chooses from by name.

    Raises:
        ValueError: two evaluations define the same option.
    """
    options = list(dict.fromkeys(task.options for task in tasks.values()))
    classes = {parent for each in options for parent in each.__mro__}
    defined = Counter(field for each in classes for field in get_annotations(each))
    if twice := [field for field, times in defined.items() if times > 1]:
        raise ValueError(f"option {twice[0]!r} is defined by two evaluations")
    # A class that another one extends is no base: its fields come with the other. Python puts the last base's first.
    bases = [each for each in options if not any(each in other.__mro__[1:] for other in options)]
    names = tuple(tasks)
    text = f"What to evaluate: {', '.join(names)}; one or several."
    choice = tyro.conf.Positional[Annotated[tuple[Literal[names], ...], tyro.conf.arg(help=text)]]  # type: ignore[valid-type]
    field = ("tasks", choice, CommonOptions.tasks)
    return make_dataclass("Options", [field], bases=tuple(reversed(bases)), frozen=True, kw_only=True)
