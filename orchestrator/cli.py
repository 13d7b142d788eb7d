"""The command line of a sweep: a recipe's name, then flags for its fields and for where it runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro

from orchestrator.flags import SweepFlags, flags_of
from orchestrator.recipes import DEFAULT, find_recipe
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.sweep_help import print_help
from workloads.errors import InputError, first_line

# In addition to the exit statuses of every command (workloads.command).
EXIT_FAILED_TRIALS = 1
EXIT_MLFLOW_REFUSED = 3  # all trials are done, and MLflow lacks some of their results

RUNS = "Compare ways to give a language model a longer context."
PLANS = "Show what a sweep would do, take and cost, trial by trial. Starts nothing."


@dataclass(frozen=True)
class Command:
    """All flags: the sweep's and the run's."""

    sweep: tyro.conf.OmitArgPrefixes[SweepFlags]
    run: tyro.conf.OmitArgPrefixes[RunOptions]


def parse(
    arguments: list[str], prog: str = "python -m orchestrator.sweep", plan: bool = False
) -> tuple[str, SweepSpec, RunOptions]:
    """The name of the sweep, the sweep, and how to run it, from command-line arguments.

    Arguments are ``[RECIPE] [flags]`` or ``--spec FILE [flags]``; ``plan`` is true for the command that only plans. An
    unknown flag, or a value of the wrong type, prints what was expected and exits with status 2.

    Raises:
        InputError: an unknown recipe, a saved sweep that cannot be read, or values that no sweep can have.
    """
    arguments = list(arguments)
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments.pop(0) if named else DEFAULT
    default = find_recipe(recipe)()
    file, arguments = _take_spec_flag(arguments)
    if file is not None:
        if named:
            raise InputError(f"both the recipe {recipe} and --spec {file} are given; expected one of them")
        default = SweepSpec.from_json(_read(file), str(file))
    if asked := {"-h", "--help", "--help-all"} & set(arguments):
        print_help(prog, PLANS if plan else RUNS, (flags_of(default), RunOptions()), whole="--help-all" in asked)
        raise SystemExit(0)
    command = tyro.cli(Command, prog=prog, default=Command(flags_of(default), RunOptions()), args=arguments)
    sweep = _correct_learning_rates_chosen(default, command.sweep.spec())
    return command.run.name or _name(recipe, sweep), sweep, command.run


def _correct_learning_rates_chosen(default: SweepSpec, sweep: SweepSpec) -> SweepSpec:
    """A recipe's statement of how it chose its learning rates does not hold for rates given as flags.

    The text enters the hash in the sweep's name: changing it renames such sweeps.
    """
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
    """The recipe's name, with a hash if fields differ from it: the same command is always the same sweep."""
    if sweep == find_recipe(recipe)():
        return recipe
    return f"{recipe}-{sweep.digest()}"


def _take_spec_flag(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """--spec replaces a recipe: it is read before the flags whose defaults it sets."""
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
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--spec {file} cannot be read: {first_line(error)}") from error
