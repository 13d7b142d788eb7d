"""Recipes: functions without arguments that return a complete sweep.

The command line names one and overrides its fields. A new recipe is a function in its family's file and an entry in
``RECIPES``; the first line of its docstring is its help text.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.recipes.convergence import convergence, convergence_llama2_7b
from orchestrator.recipes.quickstart import quickstart
from orchestrator.spec import SweepSpec
from workloads.errors import InputError, unknown

RECIPES: dict[str, Callable[[], SweepSpec]] = {
    "quickstart": quickstart,
    "convergence": convergence,
    "convergence-llama2-7b": convergence_llama2_7b,
}
DEFAULT = "quickstart"


def find_recipe(name: str) -> Callable[[], SweepSpec]:
    """The recipe of that name.

    Raises:
        InputError: there is none; the message suggests a name that is near, if one is.
    """
    if name not in RECIPES:
        raise InputError(unknown("recipe", name, RECIPES))
    return RECIPES[name]
