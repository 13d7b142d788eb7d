"""Variants: what a sweep compares, a method with the values of the axes that have an effect on it.

An axis is a field of :class:`~workloads.config.TrainingConfig` for which a sweep has several values. Without axes a
variant is a method. Settings of one variant differ in their learning rate, or in what a search varies; they compete,
and the best represents it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from workloads.config import Method, TrainingConfig
from workloads.errors import InputError
from workloads.wording import METHOD_LABELS, axis_value, has_effect


@dataclass(frozen=True)
class Variant:
    """A method with the values of the axes that have an effect on it, by field in the order of the axes."""

    method: Method
    values: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, training: TrainingConfig, axes: Iterable[str]) -> Variant:
        """The variant that a trial belongs to."""
        return cls(
            training.method, tuple((name, getattr(training, name)) for name in axes if has_effect(training, name))
        )

    @property
    def id(self) -> str:
        """Its key in comparison.json and in metrics: ``lora+``, ``lora+ YaRN last 4 layers``."""
        return " ".join([self.method, *self._values()])

    @property
    def name(self) -> str:
        """Its name in a sentence: ``LoRA+``, ``LoRA+ · YaRN · last 4 layers``."""
        return " · ".join([METHOD_LABELS[self.method], *self._values()])

    def coordinates(self) -> dict[str, Any]:
        """Its method and the values of its axes, by field."""
        return {"method": self.method, **dict(self.values)}

    def differences(self, other: Variant) -> set[str]:
        """The fields that have an effect on both and different values."""
        ours = self.coordinates()
        return {field for field, value in other.coordinates().items() if ours.get(field, value) != value}

    def _values(self) -> list[str]:
        return [axis_value(field, value) for field, value in self.values]


def variants_of(trainings: Iterable[TrainingConfig], axes: Iterable[str]) -> list[Variant]:
    """The variants of trained trials, each once, in order."""
    axes = tuple(axes)
    return list(dict.fromkeys(Variant.of(each, axes) for each in trainings if each.method != "untuned"))


def find_variant(text: str, variants: Iterable[Variant]) -> Variant:
    """The variant of that name, as reports show it or without its dots and capitals.

    Raises:
        InputError: there is none; lists their names.
    """
    known = list(variants)
    for variant in known:
        if _plain(text) in (_plain(variant.id), _plain(variant.name)):
            return variant
    names = ", ".join(repr(variant.name) for variant in known)
    raise InputError(f"--baseline {text!r} is none of the sweep's settings; expected one of {names}")


def _plain(name: str) -> list[str]:
    return name.lower().replace("·", " ").split()


def nearest_variant(wanted: Variant, candidates: Iterable[Variant]) -> Variant | None:
    """The first candidate that differs from a variant in the fewest axes, the method aside; None without candidates."""
    return min(candidates, key=lambda candidate: len(wanted.differences(candidate) - {"method"}), default=None)
