"""The scheduler's queue in the form that Tune takes: a search algorithm."""

from __future__ import annotations

from typing import Any

from ray.tune.search import Searcher

from orchestrator.planning.scheduling import JobQueue


class TuneQueue(Searcher):
    """Hands Tune one job of a :class:`orchestrator.planning.scheduling.JobQueue` after the other, each when it fits.

    Tune pickles its search algorithm and would save its state. There is none to save: the journals have it.
    """

    def __init__(self, queue: JobQueue) -> None:
        super().__init__()
        self.queue = queue

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "queue": None}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of the job that starts now; None while none fits."""
        if job := self.queue.next(trial_id):
            return job.config
        return Searcher.FINISHED if self.queue.all_started else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Frees the job's place."""
        self.queue.end(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing; Tune requires the method."""

    def restore(self, checkpoint_path: str) -> None:
        """Restores nothing; Tune requires the method."""
