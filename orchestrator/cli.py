"""The command line of a sweep: a recipe by its name, then flags for each of its fields and for where it runs."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from orchestrator.recipes import DEFAULT, RECIPES, find_recipe
from orchestrator.spec import RunOptions, SweepSpec
from workloads.errors import InputError


@dataclass(frozen=True)
class Command:
    sweep: tyro.conf.OmitArgPrefixes[SweepSpec]
    run: tyro.conf.OmitArgPrefixes[RunOptions]


@dataclass(frozen=True)
class PlanCommand(Command):
    cluster: str | None = None
    """Plan for a cluster by the name of its file in clusters/, such as aws-p4d, at its full size."""


def parse(arguments: list[str]) -> tuple[str, SweepSpec, RunOptions]:
    """(name of the sweep, the sweep, how to run it) from command-line arguments.

    ``[RECIPE] [flags]`` or ``--spec FILE [flags]``. An unknown flag, or a value of the wrong type, prints what was
    expected and exits with status 2, as command lines do.

    Raises:
        InputError: an unknown recipe, a saved sweep that cannot be read, or values that no sweep can have.
    """
    name, command = _parse(arguments, Command, "python -m orchestrator.sweep", _description())
    return name, command.sweep, command.run


def parse_plan(arguments: list[str]) -> tuple[str, SweepSpec, RunOptions, str | None]:
    """As :func:`parse`, for the command that only plans: also the name of a cluster to plan for, or None."""
    description = "What a sweep would do and take, trial by trial; nothing is started.\n\n" + _description()
    name, command = _parse(arguments, PlanCommand, "python -m orchestrator.plan", description)
    return name, command.sweep, command.run, command.cluster


def _parse(arguments: list[str], kind: type[Command], prog: str, description: str) -> tuple[str, Command]:
    recipe, arguments = DEFAULT, list(arguments)
    named = bool(arguments) and not arguments[0].startswith("-")
    if arguments and not arguments[0].startswith("-"):
        recipe = arguments.pop(0)
    default = find_recipe(recipe)()
    file, arguments = _take_spec_flag(arguments)
    if file is not None:
        if named:
            raise InputError(f"both the recipe {recipe} and --spec {file} are given; expected one of them")
        default = SweepSpec.from_json(_read(file), str(file))
    command = tyro.cli(kind, prog=prog, description=description, default=kind(default, RunOptions()), args=arguments)
    sweep = _with_true_words_on_rates(default, command.sweep)
    return command.run.name or _name(recipe, sweep), dataclasses.replace(command, sweep=sweep)


def _with_true_words_on_rates(default: SweepSpec, sweep: SweepSpec) -> SweepSpec:
    """What a recipe says of how it chose its learning rates does not hold for rates that are given as flags."""
    fields = [
        field.name
        for field in dataclasses.fields(sweep)
        if field.name.startswith("learning_rate_") and field.name != "learning_rate_sweep"
    ]
    given = [f"--{name.replace('_', '-')}" for name in fields if getattr(sweep, name) != getattr(default, name)]
    if not given or sweep.learning_rates_chosen != default.learning_rates_chosen:
        return sweep
    return dataclasses.replace(sweep, learning_rates_chosen=f"not stated of {', '.join(given)}, given as flags")


def _name(recipe: str, sweep: SweepSpec) -> str:
    """The recipe's name, with a hash where fields differ from it: the same command is always the same sweep."""
    if sweep == find_recipe(recipe)():
        return recipe
    return f"{recipe}-{hashlib.sha256(sweep.to_json().encode()).hexdigest()[:6]}"


def _take_spec_flag(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """--spec takes the place of a recipe, so it is read before the flags whose defaults it sets."""
    for index, argument in enumerate(arguments):
        if argument == "--spec":
            if index + 1 == len(arguments):
                raise InputError("--spec needs a file: the spec.json of a sweep's folder")
            return Path(arguments[index + 1]), arguments[:index] + arguments[index + 2 :]
        if argument.startswith("--spec="):
            return Path(argument.removeprefix("--spec=")), arguments[:index] + arguments[index + 1 :]
    return None, arguments


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise InputError(f"--spec {file} cannot be read: {error.strerror}") from error


def _description() -> str:
    lines = (
        f"  {name}{' (default)' if name == DEFAULT else ''}: {make.__doc__.splitlines()[0]}"
        for name, make in RECIPES.items()
    )
    recipes = "\n".join(lines)
    return (
        "Sweep ways to give a language model a longer context, and compare them.\n\n"
        "usage: python -m orchestrator.sweep [RECIPE | --spec FILE] [flags]\n\n"
        f"RECIPE is one of\n{recipes}\n\n"
        "--spec FILE reruns a saved sweep (the spec.json of its folder) exactly. Every field can be overridden below. "
        "The same command always continues: what is finished is not trained again."
    )
