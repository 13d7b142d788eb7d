"""``python -m orchestrator.cancel TRIAL|SWEEP``: ends trials from another terminal, each with a checkpoint.

A request is a small file, ``trials/<fingerprint>/cancel.json``; a whole sweep's is ``sweeps/<name>/cancel.json`` beside
those of its trials. The worker that trains the trial finds it within two seconds and ends it after the step it is in;
a trial that waits does not begin. The other trials of the sweep go on. A request holds for all who would train the
trial, until a command adds it anew: the same sweep command takes it up where it stopped.
"""

from __future__ import annotations

import getpass
import socket
import sys
from typing import Annotated

import tyro

from orchestrator.records.cancellation import request
from orchestrator.records.storage import Storage
from workloads.command import run_command
from workloads.errors import InputError


def main(
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRIAL|SWEEP")],
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs",
) -> None:
    """Cancels a trial, or all of a sweep, from another terminal: it stops with a checkpoint, and the same sweep command
    takes it up again.

    Args:
        what: A fingerprint or the first digits of one, SWEEP/LABEL such as 'convergence/lora 2048', or a sweep's name.
        storage: The sweep's storage root.
    """
    # What a worker imports of this module does without what a command shows.
    from orchestrator.reporting.overview import Overview

    opened = Storage.at(storage)
    overview = Overview(opened)
    by = f"{getpass.getuser()} on {socket.gethostname()}"
    if what in opened.sweeps():
        sweep = overview.sweep(what)
        if not sweep.runs:
            raise InputError(f"the sweep {what} does not run; nothing is cancelled")
        request(opened, f"sweeps/{what}", by)
        trials = [trial for trial in sweep.trials if trial.is_to_do]
    else:
        trials = [overview.find(what)]
        if not trials[0].is_to_do:
            raise InputError(f"{trials[0].label} ({trials[0].fingerprint}) is {trials[0].state}; nothing is cancelled")
    for trial in trials:
        request(opened, f"trials/{trial.fingerprint}", by)
        then = "does not begin" if trial.state == "waiting" else "stops with a checkpoint"
        print(f"cancelled: {trial.label} ({trial.fingerprint}), {trial.state}: it {then}")
    print("The same sweep command goes on with what is cancelled.")


if __name__ == "__main__":
    sys.exit(run_command(main, "orchestrator.cancel"))
