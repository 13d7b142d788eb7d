"""``python -m workloads.evaluate MODEL [perplexity] [passkey] [topics] [flags]``: a model at several lengths.

The tasks and their flags come from the registry, ``workloads.evaluation.tasks``.
"""

from __future__ import annotations

import sys

import tyro
from rich.console import Console

from workloads.command import EXIT_INTERRUPTED, EXIT_USER_ERROR
from workloads.errors import InputError
from workloads.evaluation.tasks import TASKS, options_of

# Wide enough for the tables if the output goes to a file.
LOG_WIDTH = 140


def main(arguments: list[str] | None = None) -> int:
    """Evaluates a model as the command line says; returns the exit status."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=LOG_WIDTH)
    try:
        options = tyro.cli(
            options_of(TASKS),
            prog="python -m workloads.evaluate",
            description="Evaluate a model at several lengths, always with full attention.",
            args=arguments,
        )
        from workloads.evaluation.run import evaluate  # imports torch and transformers, which --help does not need

        for file in evaluate(options, console):
            console.print(str(file), soft_wrap=True)
        return 0
    except InputError as error:
        console.print(f"error: {error}", style="bold red", soft_wrap=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        console.print("\ninterrupted; the results of the running task are lost.")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
