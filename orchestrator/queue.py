"""What Tune starts next: one drive after the other, made only when there is room for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray.tune.search import Searcher


class DriveQueue(Searcher):
    """Hands Tune the configurations of an iterator, which may go on by what has finished until then.

    Tune pickles what it is given and would save its state. There is none: what has begun is told by the journals.
    """

    def __init__(self, drives: Iterator[dict[str, Any]]) -> None:
        super().__init__()
        self.drives = drives

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "drives": iter(())}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        return next(self.drives, Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass
