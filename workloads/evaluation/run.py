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
from workloads.errors import one_error
from workloads.evaluation.intervals import CONFIDENCE
from workloads.evaluation.options import CommonOptions
from workloads.evaluation.subject import load_subject
from workloads.evaluation.task import EvaluationTask, Result
from workloads.evaluation.tasks import TASKS
from workloads.files.given import existing_path
from workloads.files.json_text import json_text
from workloads.trained import TrainedTrial


def evaluate(options: CommonOptions, console: Console) -> list[Path]:
    """Runs every task, prints its table, and returns the files written.

    Raises:
        InputError: an option of any task cannot work; it is raised before the first task runs.
    """
    tasks = [TASKS[name] for name in dict.fromkeys(options.tasks)]
    if not options.dry_run:
        with one_error(f"--output {options.output} cannot be made", "Give a folder in a place that can be written."):
            options.output.mkdir(parents=True, exist_ok=True)
    if len(tasks) == 1 and not options.lengths and not TrainedTrial.is_at(options.model):
        options = replace(options, lengths=tasks[0].default_lengths(options))
    subject = load_subject(options, console)
    prepared = [(task, task.prepare(subject, options, console)) for task in tasks]
    files = []
    for task, run in [] if options.dry_run else prepared:
        result = {"task": task.name, "model": subject.about, **run(), "seed": options.seed, "confidence": CONFIDENCE}
        result |= {"options": recorded_options(options), "environment": environment(subject.engine)}
        for part in task.table(result):
            console.print(part)
        files += _write(result, task, options)
    return files


def _write(result: Result, task: EvaluationTask, options: CommonOptions) -> list[Path]:
    found = existing_path(options.model)
    name = re.sub(r"[^\w.-]+", "-", found.resolve().name if found else options.model).strip("-")
    stretched = options.positions != "none" and result["model"]["positions"] != "none"
    suffix = f"-{options.positions}" if stretched else ""
    path = _result_path(options.output, f"{task.name}-{name}{suffix}", result)
    path.write_text(json_text(result, indent=1), "utf-8")
    return [path, task.picture(result, path.with_suffix(".png"))]


def _result_path(folder: Path, name: str, result: Result) -> Path:
    """The file of a result: ``name.json``, else ``name-2.json`` and so on.

    It is the first that does not exist or holds an earlier result of the same model and options. Results of other
    lengths, data or weights are kept.
    """
    ours = json.loads(json.dumps([result["model"], result["options"]]))
    number, path = 1, folder / f"{name}.json"
    while path.exists():
        try:
            earlier = json.loads(path.read_text("utf-8"))
            if [earlier["model"], earlier["options"]] == ours:
                break
        except Exception:  # another file with this name, or a folder
            pass
        number += 1
        path = folder / f"{name}-{number}.json"
    return path


def recorded_options(options: CommonOptions) -> dict[str, Any]:
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
