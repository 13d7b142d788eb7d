"""What Tune starts next: the jobs of a :class:`orchestrator.running.scheduling.JobQueue`."""

from __future__ import annotations

from typing import Any

from ray.tune.search import Searcher

from orchestrator.running.scheduling import JobQueue


class TuneQueue(Searcher):
    """Hands Tune one job after the other, each when there is room for it.

    Tune pickles what it is given and would save its state. There is none: what has begun is told by the journals.
    """

    def __init__(self, queue: JobQueue) -> None:
        super().__init__()
        self.queue = queue

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "queue": None}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if job := self.queue.next(trial_id):
            return job.config
        return Searcher.FINISHED if self.queue.all_have_begun else None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.queue.end(trial_id)

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass
