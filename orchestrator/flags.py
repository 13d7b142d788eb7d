"""A sweep's fields as command-line flags: each field that can be an axis takes one or more values."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import tyro

from orchestrator.axes import AXES, LISTS, as_text
from orchestrator.spec import SweepSpec


class SweepFlags(SweepSpec):
    """A sweep as its flags give it: fields that can be axes are tuples of their values.

    Made by ``flags_of``, of a class with the flags' types; their help is that of ``SweepSpec``.
    """

    def __post_init__(self) -> None:
        """Checks the sweep: values that it cannot have are errors of the command line.

        Raises:
            InputError: values that a sweep cannot have.
        """
        self.spec()

    def spec(self) -> SweepSpec:
        """The sweep."""
        values = {name: getattr(self, name) for name in TYPES}
        if values["document_mask"] == ():  # the flag alone
            values["document_mask"] = (True,)
        return SweepSpec.of(values)


def _type(name: str, one: Any) -> Any:
    """Of a field's flag. Several lists are given as words joined by commas, so the type of one serves."""
    return tuple.__class_getitem__((one, ...)) if name in AXES and name not in LISTS else one


_HINTS = get_type_hints(SweepSpec, include_extras=True)
TYPES = {
    each.name: _type(each.name, _HINTS[each.name]) for each in dataclasses.fields(SweepSpec) if each.name != "axes"
}
_NO_FLAG: Any = tyro.conf.Suppress[tyro.conf.Fixed[dict[str, Any]]]
_FLAGS = dataclasses.make_dataclass(
    "SweepFlags", [*TYPES.items(), ("axes", _NO_FLAG)], bases=(SweepFlags,), frozen=True, kw_only=True
)


def flags_of(spec: SweepSpec) -> SweepFlags:
    """A sweep's flags; ``spec()`` is the inverse."""
    values = {
        name: spec.values_of(name) if name in AXES and name not in LISTS else getattr(spec, name) for name in TYPES
    }
    for name in LISTS:
        if name in spec.axes:
            values[name] = tuple(as_text(value) for value in spec.axes[name])
    flags: SweepFlags = _FLAGS(**values, axes={})
    return flags
