"""How the worker that trains a trial writes its journal, checkpoints and log.

In a local storage they are written in place. To an object store they are uploaded by separate threads, so that no step
waits. Steps and evaluations are sent within 2 s, all other lines of the journal at once. A checkpoint is sent while
training continues: after all lines before it, since a trial resumed from it does not repeat them, and before its line
"saved". An unreachable store is waited for without limit during training, afterwards for five minutes.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.records.events import Eval, Event, Finished, Saved, Step, as_line
from orchestrator.records.journal import Journal
from orchestrator.records.leases import Lease, LeaseLost
from orchestrator.records.object_store import RETRY_LIMIT_S, ObjectStore, retry
from orchestrator.records.segments import SegmentedJournal

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A process that dies loses steps and evaluations of at most this time.
FLUSH_S = 2.0
CAN_WAIT = (Step, Eval)
LOG_EVERY_S = 30.0
# If the newest is damaged, the one before it is used, whatever this machine keeps.
LEAST_STORED = 2
CHECKPOINT_NAME = re.compile(r"step-[0-9]{8}")


class LocalWriter:
    """Writes the journal of a trial in a local storage, for the holder of its lease. A context."""

    def __init__(self, journal: Journal, lease: Lease) -> None:
        self.journal, self.lease = journal, lease

    def __enter__(self) -> LocalWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def append(self, event: Event) -> None:
        """Adds a line to the journal.

        Raises:
            LeaseLost: another process trains the trial now.
        """
        self.lease.check()
        self.journal.append(event)


class Uploader:
    """Uploads journal, checkpoints and log of a trial. A context: on exit everything is stored.

    Args:
        folder: the trial's folder on this machine, which holds checkpoints/ and log.txt.
        prefix: the trial's name in the store.
    """

    def __init__(self, journal: SegmentedJournal, lease: Lease, store: ObjectStore, folder: Path, prefix: str) -> None:
        self.journal, self.lease, self.store, self.folder, self.prefix = journal, lease, store, folder, prefix
        self.staging = folder / f".uploading-{os.getpid()}"
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._added = self._stored = 0  # lines
        self._urgent = False
        self._next: tuple[Path, str, int] | None = None  # a checkpoint to send, its line, and how many lines go first
        self._sending = False
        self._closed = False
        self._ended_at: float | None = None  # when training did
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"upload-{name}", daemon=True)
            for name, loop in (("journal", self._send_lines), ("checkpoint", self._send_checkpoints))
        ]

    def __enter__(self) -> Uploader:
        for leftover in self.folder.glob(".uploading-*"):  # of a dead process: we hold the lease
            shutil.rmtree(leftover, ignore_errors=True)
        self.staging.mkdir(parents=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        lost = isinstance(error, LeaseLost)
        with self._changed:
            self._closed, self._ended_at = True, self._ended_at or time.monotonic()
            if lost:
                self._lines, self._next, self._error = [], None, error
            self._changed.notify_all()
        journal, checkpoints = self._threads
        checkpoints.join()
        with self._changed:
            self._changed.notify_all()
        journal.join()
        shutil.rmtree(self.staging, ignore_errors=True)
        if not lost:
            self._send_log()
        if self._error and error is None:
            raise self._error

    def append(self, event: Event) -> None:
        """Adds a line to the journal. ``Saved`` sends the checkpoint before its line; ``Finished`` waits for that.

        Raises:
            LeaseLost: another process trains the trial now.
            OSError: something written earlier cannot be stored.
        """
        if self.lease.lost:
            raise self.lease.lost
        line = as_line(event)
        with self._changed:
            if isinstance(event, Finished):
                self._ended_at = time.monotonic()
                self._changed.wait_for(lambda: self._error or not (self._next or self._sending))
            if self._error:
                raise self._error
            if isinstance(event, Saved):
                # It replaces one that is still waiting.
                self._next, self._urgent = (self._stage(event.step), line, self._added), True
            else:
                self._add(line, urgent=not isinstance(event, CAN_WAIT))
            self._changed.notify_all()

    def _add(self, line: str, urgent: bool) -> None:
        self._lines.append(line)
        self._added += 1
        self._urgent |= urgent

    def _stage(self, step: int) -> Path:
        """Hard links to a checkpoint's files, which stay when training removes it."""
        checkpoint = self.folder / "checkpoints" / f"step-{step:08d}"
        staged = self.staging / checkpoint.name
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(checkpoint, staged, copy_function=os.link)
        return staged

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            logger.error("the upload failed: %s", error)
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _send_lines(self) -> None:
        logged = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._is_complete(), timeout=FLUSH_S)
                lines, self._lines, self._urgent = self._lines, [], False
                last = self._is_complete()
            if lines:
                content = "".join(lines).encode()
                self._send(partial(self.journal.write, content))
                with self._changed:
                    self._stored += len(lines)
                    self._changed.notify_all()
            if last:
                return
            if time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                self._send_log()

    def _send_checkpoints(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next or self._closed)
                if not self._next:
                    return
                (staged, line, first), self._next, self._sending = self._next, None, True
                self._wait_for_lines(first)
                if self._error:
                    return
            self.store.upload_folder(staged, f"{self.prefix}/checkpoints/{staged.name}", self._send)
            with self._changed:
                self._add(line, urgent=True)
                self._sending = False
                self._changed.notify_all()
            self._send(partial(self._remove_old, staged.name))
            shutil.rmtree(staged, ignore_errors=True)

    def _wait_for_lines(self, number: int) -> None:
        self._changed.wait_for(lambda: self._stored >= number or self._error)

    def _remove_old(self, newest: str) -> None:
        """Removes stored checkpoints, but for those on this machine and the last two up to this one."""
        stored = stored_checkpoints(self.store, self.prefix)
        kept = {path.name for path in (self.folder / "checkpoints").glob("step-*")}
        kept |= set([name for name in stored if name <= newest][-LEAST_STORED:])
        for name in stored:
            if name not in kept:
                self.store.remove_folder(f"{self.prefix}/checkpoints/{name}")

    def _send(self, call: Callable[[], T]) -> T:
        """Calls the store as the holder of the lease, with retries while training runs and five minutes after it."""

        def held() -> T:
            self.lease.check()
            return call()

        def give_up(waited: float) -> bool:
            return self._ended_at is not None and time.monotonic() - self._ended_at > RETRY_LIMIT_S

        return retry(held, give_up)

    def _send_log(self) -> None:
        try:
            self.store.upload(self.folder / "log.txt", f"{self.prefix}/log.txt")
        except Exception as error:  # nothing depends on it, and it is sent again
            logger.debug("the log was not sent: %s", error)

    def _is_complete(self) -> bool:
        """Whether no line can be added any more: a checkpoint's is added after its upload."""
        return self._closed and not self._threads[1].is_alive()


def stored_checkpoints(store: ObjectStore, prefix: str) -> list[str]:
    """The names of a trial's checkpoints in a store, whole or not, oldest first; anything else there is passed over."""
    folder = f"{prefix}/checkpoints/"
    found = {name.removeprefix(folder).partition("/")[0] for name in store.names(folder.rstrip("/"))}
    return sorted(name for name in found if CHECKPOINT_NAME.fullmatch(name))
