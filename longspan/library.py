"""The functions of the Python library: plan, run and open sweeps."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from longspan.results import Sweep
from orchestrator.process import restored_signal_handlers
from orchestrator.recipes import DEFAULT
from orchestrator.records.storage import Storage
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.sweep_file import is_file_name, name_of, override, read_sweep, read_sweep_file, recipe_as_file
from workloads.errors import InputError, unknown
from workloads.terminal import make_console

if TYPE_CHECKING:
    from pandas import DataFrame

    from orchestrator.planning.planner import Planned

What: TypeAlias = str | Path | SweepSpec | Mapping[str, Any]


def sweep(what: What = DEFAULT, *, progress: bool = True, **overrides: Any) -> Sweep:
    """Plans, runs or resumes a sweep, and compares its trials: ``longspan sweep`` from Python.

    The same call always continues: finished trials are not trained again. It starts Ray on this machine, or joins the
    cluster of ``address``, and returns when all trials have ended. A trial that failed is a row of ``results`` with the
    state ``failed``.

    Args:
        what: a recipe's name, a file (docs/files.md), a ``SweepSpec``, or what such a file holds as a mapping.
        progress: print the plan, the progress and the answer.
        overrides: fields of the sweep (a list of values makes an axis) and options of the run, such as ``steps=100``,
            ``positions=["linear", "yarn"]``, ``storage="/shared/runs"`` or ``workers=2``.

    Raises:
        InputError: settings that cannot be, a plan that does not fit, or an unreachable store or cluster; the message
            says what to do. It is a ValueError.
        KeyboardInterrupt: Ctrl-C; the trials keep their checkpoints.
    """
    from orchestrator.sweep import run_sweep

    if threading.current_thread() is not threading.main_thread():
        raise InputError(
            f"longspan.sweep was called in the thread {threading.current_thread().name!r}; expected the main thread, "
            "the only one in which Python handles Ctrl-C and SIGTERM. Call it there, or run the command in a subprocess"
        )
    name, spec, options = _resolve(what, overrides)
    console = make_console()
    console.quiet = not progress
    with restored_signal_handlers():
        run_sweep(name, spec, options, console)
    return open_sweep(options.storage, name)


def plan(what: What = DEFAULT, **overrides: Any) -> DataFrame:
    """What a sweep would do with each trial, and what it would take: ``longspan plan`` from Python. Starts nothing.

    Args:
        what, overrides: as for :func:`sweep`.

    Returns:
        A row for each trial: its ``action`` (run, resume, known, stopped, infeasible) with the ``reason``, and the
        predicted ``seconds``, device ``hours``, ``usd`` and ``memory_gib`` of each worker; NaN where it is unknown.
    """
    import pandas

    from orchestrator.plan import make_plan

    _, made = make_plan(*_resolve(what, overrides))
    rows = [
        {
            "label": planned.trial.label,
            "method": planned.trial.training.method,
            "context_length": planned.trial.training.context_length,
            "action": planned.action,
            "reason": planned.reason,
            **{name: _cost(planned, name) for name in ("seconds", "hours", "usd")},
            "memory_gib": planned.estimate.memory.total / 2**30,
            "fingerprint": planned.trial.fingerprint,
        }
        for planned in made.planned
    ]
    return pandas.DataFrame(rows).astype({"seconds": float, "hours": float, "usd": float})


def _cost(planned: Planned, name: str) -> float | None:
    """What is left to spend on a trial: nothing if it is done, None if it is unknown or cannot run."""
    if planned.trains:
        return getattr(planned.estimate, name)
    return None if planned.action == "infeasible" else 0.0


def open_sweep(storage: str | Path = "./runs", name: str | None = None) -> Sweep:
    """A sweep that has finished, with its results.

    Args:
        storage: the storage root: a folder, or an object store such as ``s3://bucket/prefix``.
        name: the sweep's name; it may be left out if the storage has only one.

    Raises:
        InputError: there is no such sweep, or several and no name; or it has not finished.
    """
    opened = Storage.at(str(storage))
    names = opened.sweeps()
    if name is None and len(names) == 1:
        (name,) = names
    if name is None or name not in names:
        found = (
            unknown("sweep", str(name), names)
            if name
            else f"expected the name of a sweep: {', '.join(names) or 'none'}"
        )
        raise InputError(f"{found} in {opened.location}")
    return Sweep(opened, name)


def _resolve(what: What, overrides: Mapping[str, Any]) -> tuple[str, SweepSpec, RunOptions]:
    """The sweep's name, its fields and its options, as :func:`orchestrator.cli.parse` gives them for flags."""
    if isinstance(what, SweepSpec):
        base = read_sweep(what.values(), "the sweep")
    elif isinstance(what, Mapping):
        base = read_sweep(what, "the sweep")
    elif isinstance(what, Path) or (isinstance(what, str) and is_file_name(what)):
        base = read_sweep_file(Path(what))
    elif isinstance(what, str):
        base = recipe_as_file(what)
    else:
        raise InputError(f"the sweep is {what!r}; expected a recipe's name, a file, a SweepSpec or a mapping")
    of_run = {field.name for field in dataclasses.fields(RunOptions)}
    run = {name: value for name, value in overrides.items() if name in of_run}
    fields = {name: value for name, value in overrides.items() if name not in of_run}
    spec, options = override(base, fields, run)
    return run.get("name") or name_of(base, spec), spec, options
