"""What an evaluation is: its options, how it runs, its table and its picture. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.evaluation.options import CommonOptions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from workloads.evaluation.subject import Subject

# An evaluation's results, as they are written to JSON.
Result = dict[str, Any]
# Runs a prepared evaluation.
Run = Callable[[], Result]


def _model_decides(options: CommonOptions) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """An evaluation that ``python -m workloads.evaluate`` runs.

    Args:
        name: the name that the command takes; its files' names begin with it.
        options: a subclass of CommonOptions with the flags of this evaluation.
        prepare: makes prompts or windows for a model and prints the cost. Takes ``options`` and raises InputError for
            what cannot work; returns a function that runs the evaluation.
        table: the results as a heading and a table.
        picture: draws the results as a PNG file at a path, and returns the path.
        default_lengths: the lengths where the user gives none; if empty, the model's own.
    """

    name: str
    options: type[CommonOptions]
    prepare: Callable[[Subject, Any, Console], Run]
    table: Callable[[Result], tuple[str, Table]]
    picture: Callable[[Result, Path], Path]
    default_lengths: Callable[[Any], tuple[int, ...]] = _model_decides
