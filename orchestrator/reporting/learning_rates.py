"""How a sweep's learning rates were chosen, in words for its report."""

from __future__ import annotations

import dataclasses

from orchestrator.axes import in_words
from orchestrator.recipes import RECIPES
from orchestrator.spec import SweepSpec
from workloads.config import TrainingFields

# Fields that the best learning rates do not depend on, or not by much.
INDEPENDENT = ("eval_every", "eval_documents")
# Fields that they depend on.
DEPENDENT = (
    "model", "data", "context_lengths", "methods", "steps", "group_size",
    *(field.name for field in dataclasses.fields(TrainingFields) if field.name not in INDEPENDENT),
)  # fmt: skip


def learning_rates_chosen(spec: SweepSpec) -> str:
    """How the learning rates were chosen, and for which settings if those were others."""
    chosen = spec.learning_rates_chosen
    for name, recipe in RECIPES.items():
        if (own := recipe()).learning_rates_chosen == chosen and (changed := changes(own, spec)):
            return f"for the recipe {name}, not for these settings ({'; '.join(changed)}): {chosen}"
    return chosen


def changes(recipe: SweepSpec, spec: SweepSpec) -> list[str]:
    """The fields with values that the recipe has not, with both: ``steps 7 instead of 48``."""
    found = []
    for name in DEPENDENT:
        given, own = _values(spec, name), _values(recipe, name)
        if not set(given) <= set(own):
            found.append(f"{name.replace('_', ' ')} {in_words(given)} instead of {in_words(own)}")
    return found


def _values(spec: SweepSpec, name: str) -> tuple[object, ...]:
    several = getattr(spec, name) if name in ("context_lengths", "methods") else spec.values_of(name)
    return tuple(several)
