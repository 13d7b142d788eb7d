"""The subcommands of ``longspan``: which module runs each, with one line of help."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand.

    Args:
        module: has ``main(arguments, prog)``, which returns the exit status.
        parameters: module:name of what its flags are read into, a function or a dataclass.
        summary: what it does.
    """

    module: str
    parameters: str
    summary: str

    def run(self, name: str, arguments: list[str]) -> int:
        """Runs it; returns its exit status."""
        return importlib.import_module(self.module).main(arguments, f"longspan {name}")

    def load_parameters(self) -> Any:
        """The function or dataclass that its flags are read into."""
        return pkgutil.resolve_name(self.parameters)


COMMANDS = {
    "sweep": Command(
        "orchestrator.sweep", "orchestrator.cli:Command", "plan, run or resume a sweep, and compare its trials"
    ),
    "plan": Command(
        "orchestrator.plan", "orchestrator.cli:Command", "what a sweep would do, take and cost; starts nothing"
    ),
    "status": Command("orchestrator.status", "orchestrator.status:show", "running and waiting trials, spending so far"),
    "cancel": Command("orchestrator.cancel", "orchestrator.cancel:cancel", "end a trial or a sweep, with a checkpoint"),
    "compare": Command(
        "orchestrator.compare.__main__",
        "orchestrator.compare.__main__:Options",
        "what differs between runs, and which is better",
    ),
    "report": Command(
        "longspan.commands.report",
        "longspan.commands.report:write_report",
        "write the report of a finished sweep again",
    ),
    "recipes": Command("longspan.commands.recipes", "longspan.commands.recipes:show_recipes", "list the recipes"),
    "evaluate": Command("workloads.evaluate", "workloads.evaluate:OPTIONS", "a model or a trial at several lengths"),
    "export": Command("workloads.export", "workloads.export:export", "a trained model, as stock transformers loads it"),
    "ask": Command("workloads.ask", "workloads.ask:answer_question", "a question about a long document"),
    "fetch": Command(
        "orchestrator.fetch", "orchestrator.fetch:print_folder", "a trial from an object store as a local folder"
    ),
    "ui": Command(
        "longspan.commands.ui", "longspan.commands.ui:show_ui", "MLflow's UI on a storage root, on this machine only"
    ),
    "doctor": Command(
        "longspan.commands.doctor", "longspan.commands.doctor:check", "whether this machine and its storage are ready"
    ),
    "cluster": Command(
        "longspan.commands.cluster", "longspan.commands.cluster:show_clusters", "list, print or check cluster files"
    ),
}
