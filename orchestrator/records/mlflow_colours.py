"""Colours of runs in MLflow's charts: one for each variant, so that seeds and context lengths share it."""

from __future__ import annotations

from dashboards.figures import METHODS, OTHERS
from orchestrator.trial_spec import TrialSpec

# MLflow's own tag, which a user's choice of a colour in its page sets too.
TAG = "mlflow.runColor"
MORE = ("#2f7d32", "#b58900", "#5d5f9c", "#d0527f", "#3f8fa8")
TRAINED = (*(colour[0] for colour in [*METHODS.values(), *OTHERS]), *MORE)
REFERENCES = ("#5c6670", "#8b949e", "#b1b8bf")


class Colours:
    """The colours that a sweep's runs have, or get."""

    def __init__(self) -> None:
        self._by_variant: dict[str, str] = {}

    def of(self, trial: TrialSpec, tagged: str | None) -> str:
        """A trial's colour: the one its run has, else its variant's, else one that no other variant has."""
        training = trial.training
        variant = f"{training.method} {training.positions if training.method == 'untuned' else trial.distinction}"
        if tagged:
            self._by_variant.setdefault(variant, tagged)
            return tagged
        if variant not in self._by_variant:
            self._by_variant[variant] = self._unused(trial)
        return self._by_variant[variant]

    def _unused(self, trial: TrialSpec) -> str:
        method, taken = trial.training.method, list(self._by_variant.values())
        own = [METHODS[method][0]] if method in METHODS and not trial.distinction else []
        choice = [*own, *(REFERENCES if method == "untuned" else TRAINED)]
        return next((colour for colour in choice if colour not in taken), choice[len(taken) % len(choice)])
