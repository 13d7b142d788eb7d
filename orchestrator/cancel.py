"""``python -m orchestrator.cancel TRIAL|SWEEP``: ends trials from another terminal, each with a checkpoint.

A request is a small file, ``trials/<fingerprint>/cancel.json``; for a whole sweep also ``sweeps/<name>/cancel.json``.
The worker that trains the trial finds it within two seconds and stops after the current step; a waiting trial does not
start. The sweep's other trials continue. A request holds for every sweep that shares the trial, until a sweep command
adds the trial again: it resumes where it stopped.
"""

from __future__ import annotations

import getpass
import socket
import sys
from typing import Annotated

import tyro

from orchestrator.records.cancellation import request
from orchestrator.records.storage import Storage
from orchestrator.reporting.overview import Overview
from workloads.command import run_command
from workloads.errors import InputError
from workloads.terminal import printable


def cancel(
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRIAL|SWEEP")],
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs",
) -> None:
    """Cancels a trial or a whole sweep. Trials stop with a checkpoint, and the same sweep command resumes them.

    Args:
        what: A fingerprint or the first digits of one, SWEEP/LABEL such as 'convergence/lora 2048', or a sweep's name.
        storage: The sweep's storage root.
    """
    opened = Storage.existing(storage)
    overview = Overview(opened)
    by = f"{getpass.getuser()} on {socket.gethostname()}"
    if what in opened.sweeps():
        sweep = overview.sweep(what)
        if not sweep.runs:
            raise InputError(f"the sweep {what} is not running; nothing to cancel")
        request(opened, f"sweeps/{what}", by)
        trials = [trial for trial in sweep.trials if trial.is_to_do]
    else:
        trials = [overview.find(what)]
        if not trials[0].is_to_do:
            raise InputError(f"{trials[0].label} ({trials[0].fingerprint}) is {trials[0].state}; nothing to cancel")
    for trial in trials:
        request(opened, f"trials/{trial.fingerprint}", by)
        then = "does not start" if trial.state == "waiting" else "stops with a checkpoint"
        print(printable(f"cancelled: {trial.label} ({trial.fingerprint}), {trial.state}: it {then}"))
    print("The same sweep command resumes cancelled trials.")


def main(arguments: list[str] | None = None, prog: str = "python -m orchestrator.cancel") -> int:
    """Runs the command; returns its exit status."""
    return run_command(cancel, prog, arguments)


if __name__ == "__main__":
    sys.exit(main())
