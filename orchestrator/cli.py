"""The command line of a sweep: a recipe or a file, then flags for its fields and for where it runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from orchestrator.flags import SweepFlags, flags_of
from orchestrator.recipes import DEFAULT, RECIPES
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.sweep_file import (
    SweepFile,
    correct_learning_rates_chosen,
    is_file_name,
    name_of,
    read_sweep_file,
    recipe_as_file,
)
from orchestrator.sweep_help import print_help
from workloads.errors import InputError

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

    Arguments are ``[RECIPE | FILE] [flags]``, or ``--spec FILE [flags]``; ``plan`` is true for the command that only
    plans. An unknown flag, or a value of the wrong type, prints what was expected and exits with status 2.

    Raises:
        InputError: an unknown recipe, a file that cannot be read, or values that no sweep can have.
    """
    base, arguments = _base(arguments)
    if asked := {"-h", "--help", "--help-all"} & set(arguments):
        print_help(prog, PLANS if plan else RUNS, (flags_of(base.spec), base.options), whole="--help-all" in asked)
        raise SystemExit(0)
    if arguments == ["--print-schema"]:
        from orchestrator.sweep_schema import schema

        print(json.dumps(schema(), indent=1))
        raise SystemExit(0)
    # Without the file's name: it holds for the file's own fields, one that is given as a flag for any.
    default = Command(flags_of(base.spec), dataclasses.replace(base.options, name=None))
    try:
        command = tyro.cli(Command, prog=prog, default=default, args=arguments)
    except SystemExit:
        _hint_at_order(arguments, prog)
        raise
    sweep = correct_learning_rates_chosen(base.spec, command.sweep.spec(), "as flags")
    return command.run.name or name_of(base, sweep), sweep, command.run


def _hint_at_order(arguments: list[str], prog: str) -> None:
    """Flags that take several values also take a recipe or file behind them, and refuse it."""
    for place, word in enumerate(arguments):
        if word in RECIPES or is_file_name(word):
            others = shlex.join(arguments[:place] + arguments[place + 1 :])
            print(f"A recipe or file comes before all flags: {prog} {word} {others}", file=sys.stderr)
            return


def _base(arguments: list[str]) -> tuple[SweepFile, list[str]]:
    """What the flags override, a recipe or a file, and the flags."""
    first, flags = (
        (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else (None, arguments)
    )
    file, flags = _take_spec_flag(flags)
    if file is not None and first is not None:
        raise InputError(f"both {first} and --spec {file} are given; expected one of them")
    if first is not None and is_file_name(first):
        file = Path(first)
    return (recipe_as_file(DEFAULT if first is None else first) if file is None else read_sweep_file(file)), flags


def _take_spec_flag(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """--spec FILE is FILE: it is read before the flags whose defaults it sets."""
    for index, argument in enumerate(arguments):
        if argument == "--spec":
            if index + 1 == len(arguments):
                raise InputError("--spec needs a file, such as the spec.json of a sweep's folder")
            return Path(arguments[index + 1]), arguments[:index] + arguments[index + 2 :]
        if argument.startswith("--spec="):
            return Path(argument.removeprefix("--spec=")), arguments[:index] + arguments[index + 1 :]
    return None, arguments
