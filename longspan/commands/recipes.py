"""``longspan recipes [NAME]``: the recipes, or one of them as a sweep file to start from."""

from __future__ import annotations

import json
from typing import Annotated, Any

import tyro

from orchestrator.field_help import GROUPS
from orchestrator.recipes import DEFAULT, RECIPES, find_recipe
from workloads.command import run_command
from workloads.terminal import make_console

# What the recipe says of its own learning rates, which a file's need not be.
NOTE = "learning_rates_chosen"


def show_recipes(
    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None,
) -> None:
    """List the recipes, or print one as a sweep file to change: longspan recipes convergence > mine.yaml.

    Args:
        name: The recipe to print, with all of its values.
    """
    if name is not None:
        print(as_file(name), end="")
        return
    console = make_console()
    for each, make in RECIPES.items():
        summary = (make.__doc__ or "").partition("\n")[0]
        console.print(f"{each}{' (default)' if each == DEFAULT else ''}: {summary}", soft_wrap=True)


def as_file(name: str) -> str:
    """The recipe as a sweep file in YAML, its fields in the groups of the help."""
    import yaml

    def line(key: str, value: Any) -> str:
        return yaml.safe_dump({key: value}, default_flow_style=None if isinstance(value, list | dict) else False)

    values = json.loads(json.dumps(find_recipe(name)().values()))  # lists for tuples
    lines = [f"# longspan sweep FILE runs it. What is left out is as in the recipe.\nrecipe: {name}\n"]
    for title, names in GROUPS.items():
        fields = [line(field, values[field]) for field in names if field in values and field != NOTE]
        lines += [f"\n# {title}\n", *fields] if fields else []
    return "".join(lines) + "\nrun:\n  storage: ./runs\n"


def main(arguments: list[str] | None = None, prog: str = "longspan recipes") -> int:
    """Runs the command; returns its exit status."""
    return run_command(show_recipes, prog, arguments)
