"""``longspan doctor``: whether this machine, its storage and its MLflow are ready for a sweep."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import tyro

from orchestrator.gpus import gpus, nvidia_driver
from orchestrator.planning.ray_files import open_to_others
from orchestrator.ray_internals import ray_folder
from orchestrator.records.mlflow_store import without_password
from orchestrator.records.storage import Storage
from orchestrator.terminal import gib
from workloads.budget.devices import host_memory
from workloads.command import run_command
from workloads.errors import InputError
from workloads.terminal import make_console

NEEDED_MEMORY = 5 * 2**30  # of the default sweep and its processes (docs/performance.md)
NEEDED_DISK = 3 * 2**30
MOST_FILES = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: what was found, and what to do where it is not as it should be."""

    subject: str
    found: str
    remedy: str | None = None

    def __str__(self) -> str:
        state = "ok" if self.remedy is None else "FIX"
        return f"{state:<4}{self.subject}: {self.found}" + ("" if self.remedy is None else f"; {self.remedy}")


def check(
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs", tracking_uri: str | None = None
) -> int:
    """Check packages, GPUs, memory, disk, Ray's files, the storage and MLflow. Status 1 if something is to be fixed.

    Args:
        storage: The storage root that your sweeps will use; it is created if missing.
        tracking_uri: MLflow tracking server, as for a sweep.
    """
    console = make_console()
    wrong = 0
    for finding in findings(storage, tracking_uri):
        console.print(str(finding), style=None if finding.remedy is None else "yellow", soft_wrap=True)
        wrong += finding.remedy is not None
    console.print("All is ready." if not wrong else f"{wrong} to fix.")
    return int(bool(wrong))


def findings(storage: str, tracking_uri: str | None) -> Iterator[Finding]:
    """Every check, in the order in which one depends on another."""
    yield _packages()
    yield _gpus()
    yield _memory()
    yield from _ray_files()
    yield from _storage(storage, tracking_uri)


def _packages() -> Finding:
    from packaging.requirements import Requirement

    python = f"Python {platform.python_version()}"
    try:
        requirements = [Requirement(text) for text in metadata.requires("longspan") or ()]
    except metadata.PackageNotFoundError:
        return Finding("packages", f"{python}, but longspan is not installed", "pip install . in its folder")
    wrong = []
    for needed in requirements:
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(installed, prereleases=True):
            wrong.append(f"{needed.name} is {installed}, not {needed.specifier}")
    if wrong:
        return Finding("packages", ", ".join(wrong), "pip install . in longspan's folder")
    return Finding("packages", f"{python}, longspan {metadata.version('longspan')} and all that it needs")


def _gpus() -> Finding:
    found = gpus()
    if not found:
        return Finding("GPUs", "none that an NVIDIA driver reports; trials run on the CPU")
    import torch

    names = ", ".join(gpu.name for gpu in found)
    if not torch.cuda.is_available():
        return Finding(
            "GPUs", f"{names}, which torch {torch.__version__} cannot use with driver {nvidia_driver()}",
            "install the build of torch for this driver's CUDA version (pytorch.org)",
        )  # fmt: skip
    return Finding("GPUs", f"{names}, driver {nvidia_driver()}, torch {torch.__version__}")


def _memory() -> Finding:
    memory = host_memory()
    remedy = None if memory >= NEEDED_MEMORY else f"the default sweep needs {gib(NEEDED_MEMORY)}"
    return Finding("memory", gib(memory), remedy)


def _ray_files() -> Iterator[Finding]:
    exposed = open_to_others()
    for text in exposed[:MOST_FILES]:
        found, _, remedy = text.rpartition("; ")
        yield Finding("Ray's files", found, remedy)
    if (more := len(exposed) - MOST_FILES) > 0:
        yield Finding("Ray's files", f"{more} more sessions like these", f"chmod 700 {ray_folder()}/session_*")
    if not exposed:
        yield Finding("Ray's files", "closed to other users")


def _storage(location: str, given: str | None) -> Iterator[Finding]:
    from orchestrator.records.mlflow_sync import Tracker, tracking_uri

    try:
        storage = Storage.open(location)
    except InputError as error:
        yield Finding("storage", f"{location} is not usable", str(error))
        return
    free = shutil.disk_usage(_existing(storage.root)).free
    needs_space = None if free >= NEEDED_DISK else f"free some: the default sweep needs {gib(NEEDED_DISK)}"
    yield Finding("storage", f"{storage.location} is writable, {gib(free)} free on its disk", needs_space)
    uri = tracking_uri(storage, given)
    try:
        Tracker(uri, "longspan", storage).connect()
    except InputError as error:
        yield Finding("MLflow", f"{without_password(uri)} is not usable", str(error))
    else:
        yield Finding("MLflow", f"{without_password(uri)} answers")


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def main(arguments: list[str] | None = None, prog: str = "longspan doctor") -> int:
    """Runs the command; returns its exit status."""
    return run_command(check, prog, arguments)
