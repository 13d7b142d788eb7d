"""YAML as people mean it: the safe loader of PyYAML with the scalars of YAML 1.2.

In YAML 1.1, which PyYAML reads, ``1e-3`` is text, ``on``, ``off``, ``yes`` and ``no`` are booleans, ``010`` is eight
and ``1:30`` is ninety. A key that is given twice, of which the first would be lost, is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "tag:yaml.org,2002:merge": (r"<<", ["<"]),
}


class Loader(yaml.SafeLoader):
    """Reads plain data: mappings, lists, text, numbers, booleans and null."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, each of whose keys is given once."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a list or a mapping is no name; expected FIELD: VALUE", key)
            if key.value in seen:
                raise _error(f"{key.value} is given twice; expected each field once", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=True)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value, or an error with its line: PyYAML raises whatever Python does of ``!!int abc``."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _error(f"{str(node.value)[:80]!r} is no {node.tag.rpartition(':')[2]}", node) from error


def _error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def _decimal(loader: Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


Loader.yaml_implicit_resolvers = {}  # none of the base class's
for _tag, (_pattern, _first) in _SCALARS.items():
    Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
