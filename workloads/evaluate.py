"""``python -m workloads.evaluate MODEL [perplexity] [passkey] [topics] [flags]``: a model at several lengths.

The tasks and their flags come from the registry, ``workloads.evaluation.tasks``.
"""

from __future__ import annotations

import sys

import tyro

from workloads.command import exit_status
from workloads.evaluation.tasks import TASKS, options_of
from workloads.terminal import make_console

# Wide enough for the tables if the output goes to a file.
LOG_WIDTH = 140


OPTIONS = options_of(TASKS)


def main(arguments: list[str] | None = None, prog: str = "python -m workloads.evaluate") -> int:
    """Evaluates a model as the command line says; returns the exit status."""
    return exit_status(lambda: _evaluate(arguments, prog))


def _evaluate(arguments: list[str] | None, prog: str) -> None:
    console = make_console(LOG_WIDTH)
    try:
        options = tyro.cli(
            OPTIONS,
            prog=prog,
            description="Evaluate a model at several lengths, always with full attention.",
            args=arguments,
        )
        from workloads.evaluation.run import evaluate  # imports torch and transformers, which --help does not need

        for file in evaluate(options, console):
            console.print(str(file), soft_wrap=True)
    except KeyboardInterrupt as interruption:
        interruption.add_note("The results of the running task are lost.")
        raise


if __name__ == "__main__":
    sys.exit(main())
