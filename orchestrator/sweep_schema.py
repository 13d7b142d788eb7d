"""The JSON schema of a sweep file, with which editors complete and check it."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from orchestrator.axes import LISTS
from orchestrator.field_help import alternatives, fields_of
from orchestrator.flags import flags_of
from orchestrator.recipes import DEFAULT, RECIPES, find_recipe
from orchestrator.run_options import RunOptions

# 3 is text too where text is expected, as in `train_layers: 3`.
_NAMES: dict[type, Any] = {
    str: ["string", "integer"], int: "integer", float: "number", bool: "boolean", type(None): "null",
}  # fmt: skip


def schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) of a sweep file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A sweep of longspan",
        **_properties(flags_of(find_recipe(DEFAULT)()), {
            "recipe": {"enum": list(RECIPES), "description": "Its values hold for the fields that are not given."},
            "run": {"description": "How the sweep runs; nothing here changes its result.", **_properties(RunOptions())},
        }),
    }  # fmt: skip


def _properties(record: Any, more: dict[str, Any] | None = None) -> dict[str, Any]:
    described = {
        name: {"description": field.help, **_schema_of_field(name, field.type)}
        for name, field in fields_of(record).items()
        if name != "axes"
    }
    return {"type": "object", "additionalProperties": False, "properties": (more or {}) | described}


def _schema_of_field(name: str, kind: Any) -> dict[str, Any]:
    """Also of the forms that are no flag's: several lists, and rules as a mapping."""
    one = _schema_of(kind)
    if name in LISTS:
        return {"anyOf": [one, {"type": "array", "items": one}]}
    if name == "learning_rate_for":
        return {"anyOf": [one, {"type": "object", "additionalProperties": {"type": "number"}}]}
    return one


def _schema_of(kind: Any) -> dict[str, Any]:
    choices = [schema for member in alternatives(kind) for schema in _of_member(member)]
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _of_member(kind: Any) -> list[dict[str, Any]]:
    """The schemas of one type: of a tuple also that of its single value."""
    if get_origin(kind) is Literal:
        return [{"enum": [*get_args(kind), *([None] if "none" in get_args(kind) else [])]}]
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        if rest == [Ellipsis]:
            return [{"type": "array", "items": _schema_of(item)}, _schema_of(item)]
        items, count = [_schema_of(each) for each in get_args(kind)], len(get_args(kind))
        return [{"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}]
    return [{"type": _NAMES[kind]}]
