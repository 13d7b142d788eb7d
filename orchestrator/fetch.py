"""``python -m orchestrator.fetch STORAGE FINGERPRINT``: a trial from an object store as a local folder.

Fetches what ``workloads.export``, ``workloads.evaluate`` and ``workloads.ask`` read of a trial, its newest checkpoint
among it, and prints the folder:

    python -m workloads.export $(python -m orchestrator.fetch s3://bucket/runs 0123456789abcdef) DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from orchestrator.records.storage import Storage
from workloads.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.fetch", description="A trial from an object store as a local folder."
    )
    parser.add_argument("storage", metavar="STORAGE", help="the sweep's --storage, such as s3://bucket/prefix")
    parser.add_argument("fingerprint", metavar="FINGERPRINT", help="the trial's name below STORAGE/trials")
    given = parser.parse_args(arguments)
    try:
        print(fetch(given.storage, given.fingerprint))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(location: str, fingerprint: str) -> Path:
    """The trial's folder on this machine; of a local storage it is where it is.

    Raises:
        InputError: there is no such trial.
    """
    folder = Storage.at(location).trial(fingerprint)
    if not folder.is_visible():
        raise InputError(f"{location} has no trial {fingerprint}; its trials are named by fingerprints, in trials/")
    if folder.store:
        folder.journal.save(folder.path / "journal.jsonl")
        folder.fetch_newest_checkpoint()
    return folder.path


if __name__ == "__main__":
    sys.exit(main())
