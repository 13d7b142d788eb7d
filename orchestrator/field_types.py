"""Whether values from JSON have the types of a dataclass's fields."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type: a class, a Literal, a union or tuple of them. An int is a float too."""
    parts = get_args(kind)
    match get_origin(kind):
        case None if kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        case None:
            return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        case origin if origin is Literal:
            return value in parts
        case origin if origin in (Union, UnionType):
            return any(is_of_type(value, part) for part in parts)
    if not isinstance(value, tuple):
        return False
    kinds = [parts[0]] * len(value) if parts[1:] == (...,) else parts
    return len(value) == len(kinds) and all(map(is_of_type, value, kinds))


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def describe_type(kind: Any) -> str:
    """A field's type in words."""
    parts = get_args(kind)
    match get_origin(kind):
        case None:
            return _WORDS[kind]
        case origin if origin is Literal:
            return f"one of {', '.join(map(repr, parts))}"
        case origin if origin in (Union, UnionType):
            return " or ".join(map(describe_type, parts))
    return (
        f"a list of {describe_type(parts[0])}" if parts[1:] == (...,) else f"{len(parts)} x {describe_type(parts[0])}"
    )
