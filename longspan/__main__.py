"""``longspan COMMAND ...``: one command for everything, a thin layer over the modules of the other packages."""

from __future__ import annotations

import contextlib
import sys

from longspan.commands import COMMANDS
from orchestrator.process import exit_without_gc
from workloads.command import exit_status
from workloads.errors import InputError, unknown

SHELLS = ("bash", "zsh", "fish")


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name].run(name, rest)
    return exit_status(lambda: _own(name, rest))


def _own(name: str, arguments: list[str]) -> None:
    """The flags of ``longspan`` itself."""
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        from importlib.metadata import version

        print(f"longspan {version('longspan')}")
    elif name == "--print-completion":
        if len(arguments) != 1 or arguments[0] not in SHELLS:
            raise InputError(f"--print-completion {' '.join(arguments)}: expected one of {', '.join(SHELLS)}")
        print_completion(arguments[0])
    else:
        from orchestrator.recipes import RECIPES

        hint = f". It is a recipe: longspan sweep {name}" if name in RECIPES else ""
        raise InputError(f"{unknown('command', name, COMMANDS)}{hint}")


def overview() -> str:
    """The help of ``longspan``."""
    return "\n".join(
        [
            "usage: longspan COMMAND ...",
            "",
            "Find out how to give a pretrained language model a longer context.",
            "",
            *(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "longspan COMMAND --help describes a command. `longspan sweep` alone runs the",
            "default recipe, which needs no GPU and no download.",
            "",
            "  --version",
            f"  --print-completion {'|'.join(SHELLS)}   a completion script, on stdout",
        ]
    )


def print_completion(shell: str) -> None:
    """Prints a completion script of every command and flag, made by tyro."""
    import tempfile
    from pathlib import Path

    import tyro

    parameters = {name: command.load_parameters() for name, command in COMMANDS.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "script"
        with contextlib.suppress(SystemExit):  # tyro's, once it has written the file
            tyro.extras.subcommand_cli_from_dict(
                parameters, prog="longspan", args=["--tyro-write-completion", shell, str(file)]
            )
        for line in file.read_text("utf-8").splitlines():
            # bash would offer the further lines of a description as words
            print(line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC = ") else line)


if __name__ == "__main__":
    exit_without_gc(main)
