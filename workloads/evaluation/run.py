"""From the options of ``python -m workloads.evaluate`` to results, printed and written as they come."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from workloads.engines.engine import Engine
from workloads.evaluation import pictures, tables
from workloads.evaluation.bootstrap import CONFIDENCE
from workloads.evaluation.options import Options
from workloads.evaluation.retrieval import Prompter
from workloads.evaluation.subject import load_subject
from workloads.evaluation.tasks import TASKS
from workloads.evaluation.topics import longchat_tests
from workloads.models.source import ModelSource


def evaluate(options: Options, console: Console) -> list[Path]:
    """Runs every task, prints its table, and returns the files written.

    Raises:
        InputError: an option of any task cannot work; it is raised before the first task runs.
    """
    if options.cases and options.tasks == ("topics",) and not options.lengths:
        options = _with_lengths_of_cases(options, options.cases)
    subject = load_subject(options, console)
    ready = {task: TASKS[task](subject, options, console) for task in dict.fromkeys(options.tasks)}
    files = []
    for task, run in {} if options.dry_run else ready.items():
        result = {"task": task, "model": subject.about, **run(), "seed": options.seed, "confidence": CONFIDENCE}
        result |= {"options": recorded_options(options), "environment": environment(subject.engine)}
        for part in tables.TABLES[task](result):
            console.print(part)
        files += _write(result, task, options)
    return files


def _with_lengths_of_cases(options: Options, cases: Path) -> Options:
    """Sets the length of LongChat's longest case, to which positions are extended."""
    if (Path(options.model) / "trial.json").is_file():
        return options
    prompter = Prompter(ModelSource.parse(options.model).tokenizer(), options.chat)
    return replace(options, lengths=(max(t.length for t in longchat_tests(prompter, cases, options.tests)),))


def _write(result: dict[str, Any], task: str, options: Options) -> list[Path]:
    path = Path(options.model)
    name = re.sub(r"[^\w.-]+", "-", path.resolve().name if path.exists() else options.model).strip("-")
    stretched = options.positions != "none" and result["model"]["positions"] != "none"
    suffix = f"-{options.positions}" if stretched else ""
    options.output.mkdir(parents=True, exist_ok=True)
    path = _result_path(options.output, f"{task}-{name}{suffix}", result)
    path.write_text(json.dumps(result, indent=1))
    return [path, pictures.PICTURES[task](result, path.with_suffix(".png"))]


def _result_path(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """The file of a result: ``name.json``, else ``name-2.json`` and so on.

    It is the first that does not exist or holds an earlier result of the same model and options. Results of other
    lengths, data or weights are kept.
    """
    ours = json.loads(json.dumps([result["model"], result["options"]]))
    number, path = 1, folder / f"{name}.json"
    while path.exists():
        try:
            earlier = json.loads(path.read_text())
            if [earlier["model"], earlier["options"]] == ours:
                break
        except (ValueError, KeyError, TypeError):
            pass  # another file with this name
        number += 1
        path = folder / f"{name}-{number}.json"
    return path


def recorded_options(options: Options) -> dict[str, Any]:
    """The options that a result depends on, beside the model and the data."""
    irrelevant = ("model", "tasks", "output", "dry_run", "batch_tokens")
    fields = {field: value for field, value in asdict(options).items() if field not in irrelevant}
    return fields | {field: str(value) for field, value in fields.items() if isinstance(value, Path)}


def environment(engine: Engine) -> dict[str, Any]:
    """The software and hardware that computed the numbers."""
    packages = {}
    for package in ("longspan", "torch", "transformers", "tokenizers"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue  # longspan itself, if it runs from its source tree
    gpu = engine.device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(engine.device) if gpu else f"{torch.get_num_threads()} CPU threads",
        "precision": str(engine.dtype).removeprefix("torch."),
        "peak_memory_gib": engine.peak_memory_gib(),
        "python": platform.python_version(),
        "packages": packages,
    }
