"""``python -m orchestrator.fetch STORAGE FINGERPRINT``: a trial from an object store as a local folder.

Downloads what ``workloads.export``, ``workloads.evaluate`` and ``workloads.ask`` need, with the trial's newest
checkpoint, and prints the folder:

    python -m workloads.export $(python -m orchestrator.fetch s3://bucket/runs 0123456789abcdef) DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from orchestrator.records.segments import SegmentedJournal
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import JOURNAL
from workloads.command import run_command
from workloads.errors import InputError


def print_folder(
    storage: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STORAGE")],
    fingerprint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FINGERPRINT")],
) -> None:
    """Fetches a trial from an object store and prints its local folder.

    Args:
        storage: The sweep's --storage, such as s3://bucket/prefix.
        fingerprint: The trial's name below STORAGE/trials.
    """
    print(fetch(storage, fingerprint))


def fetch(location: str, fingerprint: str) -> Path:
    """The trial's folder on this machine; in a local storage, its own folder.

    Raises:
        InputError: there is no such trial.
    """
    folder = Storage.existing(location).trial(fingerprint)
    if not folder.is_visible():
        raise InputError(f"{location} has no trial {fingerprint}; its trials are named by fingerprints, in trials/")
    if isinstance(folder.journal, SegmentedJournal):
        folder.journal.save(folder.path / JOURNAL)
        folder.fetch_newest_checkpoint()
    return folder.path


def main(arguments: list[str] | None = None, prog: str = "python -m orchestrator.fetch") -> int:
    """Runs the command; returns its exit status."""
    return run_command(print_folder, prog, arguments)


if __name__ == "__main__":
    sys.exit(main())
