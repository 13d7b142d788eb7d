"""A trial's journal in an object store, which cannot append: numbered segments of some lines each.

    trials/<fingerprint>/journal/00000001.jsonl, 00000002.jsonl, ...

Each is created only if absent and never changed. Creating the next number appends to the journal: the numbers order the
lines of any number of writers, without a clock, and a reader asks for the number after its last.
"""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path

from orchestrator.records.events import Event, Parsed, as_line, parse
from orchestrator.records.journal import Read
from orchestrator.records.object_store import ObjectStore, is_transient, retry
from workloads.errors import reason
from workloads.files.safe import replace_file

# A follower asks for a trial's next segment at most this often.
POLL_S = 2.0


class SegmentedJournal:
    """The journal with its segments under ``folder`` of ``store``; what was read is kept in memory.

    Offsets count segments. Get one with :meth:`at`: all readers of a process share it.
    """

    def __init__(self, store: ObjectStore, folder: str) -> None:
        self.store, self.folder = store, folder
        self._segments: list[Parsed] = []
        self._lock = threading.Lock()
        self._asked_at: float | None = None

    @classmethod
    @functools.cache
    def at(cls, store: ObjectStore, folder: str) -> SegmentedJournal:
        """The journal in a folder, one a process."""
        return cls(store, folder)

    @property
    def location(self) -> str:
        """The folder of the segments, to be shown."""
        return f"{self.store.url}/{self.folder}"

    def append(self, event: Event) -> None:
        """Adds a line, which is stored on return; waits for an unreachable store."""
        content = as_line(event).encode()
        retry(lambda: self.write(content))

    def write(self, content: bytes) -> None:
        """Stores whole lines as the next segment. An unreachable store raises at once; the call can be repeated."""
        with self._lock:
            self._catch_up()
            # Another writer may be first. A segment with exactly our lines is ours: the store's answer was lost.
            while not self.store.create(self._next(), content):
                number = len(self._segments)
                self._catch_up()
                if parse(content) in self._segments[number:]:
                    return
            self._segments.append(parse(content))

    def read(self, offset: int = 0) -> Read:
        """The events of the segments after the first ``offset``; waits for an unreachable store."""
        with self._lock:
            retry(self._catch_up)
            return self._after(offset)

    def poll(self, offset: int) -> Read:
        """As ``read``, for followers: asks the store every 2 s, and returns what is known if it is unreachable."""
        due = self._asked_at is None or time.monotonic() - self._asked_at > POLL_S
        if due and self._lock.acquire(blocking=False):
            try:
                self._catch_up()
                self.store.trouble = None
            except Exception as error:
                if not is_transient(error):
                    raise
                self._asked_at = time.monotonic()
                self.store.trouble = f"the storage does not answer ({reason(error)}); training goes on, trying again"
            finally:
                self._lock.release()
        return self._after(offset)

    def exists(self) -> bool:
        """Whether anything was ever written."""
        return self.read().offset > 0

    def save(self, file: Path) -> None:
        """Writes the journal into one local file, with the format of a local storage's."""
        with self._lock:
            retry(self._catch_up)
            names = self.store.names(self.folder)
            replace_file(file, b"".join(retry(lambda: self.store.read_many(names))))

    def _catch_up(self) -> None:
        if not self._segments:
            self._segments = [parse(content) for content in self.store.read_many(self.store.names(self.folder))]
        while (content := self.store.read(self._next())) is not None:
            self._segments.append(parse(content))
        self._asked_at = time.monotonic()

    def _after(self, offset: int) -> Read:
        segments = self._segments[offset:]
        return Read(
            [event for segment in segments for event in segment.events],
            offset + len(segments),
            [line for segment in segments for line in segment.skipped],
        )

    def _next(self) -> str:
        return f"{self.folder}/{len(self._segments) + 1:08d}.jsonl"
