"""Journals in tests."""

from collections.abc import Callable

from orchestrator.records.events import make_event
from orchestrator.records.journal import Journal


def emit_to(journal: Journal) -> Callable[..., None]:
    """What ``workloads.training.loop`` calls with each event, writing it to a journal."""
    return lambda name, **fields: journal.append(make_event(name, **fields))
