"""``longspan recipes``: the recipes, by name."""

from __future__ import annotations

from orchestrator.recipes import DEFAULT, RECIPES
from workloads.command import run_command
from workloads.terminal import make_console


def show_recipes() -> None:
    """List the recipes that `longspan sweep` and `longspan plan` take."""
    console = make_console()
    for name, make in RECIPES.items():
        summary = (make.__doc__ or "").partition("\n")[0]
        console.print(f"{name}{' (default)' if name == DEFAULT else ''}: {summary}")


def main(arguments: list[str] | None = None, prog: str = "longspan recipes") -> int:
    """Runs the command; returns its exit status."""
    return run_command(show_recipes, prog, arguments)
