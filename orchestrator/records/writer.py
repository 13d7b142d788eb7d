"""What the worker that trains a trial leaves behind: its journal, its checkpoints, its log.

In a local storage they are where they belong as soon as they are written. To an object store they are sent by threads
of their own, so that no step waits for it. Lines of the journal are sent at most 2 s after they were written, those
that others decide by at once. A checkpoint is sent while training goes on: after all lines that came before it, since
who goes on from it does not tell them again, and before its line "saved". While training goes on a store that is away
is waited for without limit, afterwards for some minutes.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.records.events import Eval, Event, Finished, Saved, Step, as_line
from orchestrator.records.journal import Journal
from orchestrator.records.leases import Lease, LeaseLost
from orchestrator.records.object_store import RETRY_LIMIT_S, ObjectStore, retry
from orchestrator.records.segments import SegmentedJournal

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A process that dies loses at most so much of its journal's steps and evaluations; all other lines are sent at once.
FLUSH_S = 2.0
CAN_WAIT = (Step, Eval)
LOG_EVERY_S = 30.0
# A damaged newest checkpoint has one before it to fall back to, whatever the folder on this machine holds.
LEAST_STORED = 2


class LocalWriter:
    """The journal of a trial in a local storage, for the holder of its lease. A context."""

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
    """Journal, checkpoints and log of a trial, sent to an object store. A context: what it leaves behind is stored.

    Args:
        folder: the trial's folder on this machine, which holds checkpoints/ and log.txt.
        prefix: the trial's name in the store.
    """

    def __init__(self, journal: SegmentedJournal, lease: Lease, store: ObjectStore, folder: Path, prefix: str) -> None:
        self.journal, self.lease, self.store, self.folder, self.prefix = journal, lease, store, folder, prefix
        self.staging = folder / f".uploading-{os.getpid()}"
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._told = self._stored = 0  # lines
        self._in_a_hurry = False
        self._next: tuple[Path, str, int] | None = None  # a checkpoint to be sent, its line, and lines before it
        self._sending = False
        self._closed = False
        self._ended_at: float | None = None  # when training did
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"upload-{name}", daemon=True)
            for name, loop in (("journal", self._send_lines), ("checkpoint", self._send_checkpoints))
        ]

    def __enter__(self) -> Uploader:
        for leftover in self.folder.glob(".uploading-*"):  # of a process that died: we hold the lease
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
        """Adds a line to the journal; "saved" has the checkpoint sent before its line is, "finished" waits for it.

        Raises:
            LeaseLost: another process trains the trial now.
            OSError: what was written before cannot be stored, now or later.
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
                # Instead of one that is still waiting.
                self._next, self._in_a_hurry = (self._stage(event.step), line, self._told), True
            else:
                self._tell(line, hurry=not isinstance(event, CAN_WAIT))
            self._changed.notify_all()

    def _tell(self, line: str, hurry: bool) -> None:
        self._lines.append(line)
        self._told += 1
        self._in_a_hurry |= hurry

    def _stage(self, step: int) -> Path:
        """A checkpoint under names of our own, which stay when training removes it: links, no copies."""
        checkpoint = self.folder / "checkpoints" / f"step-{step:08d}"
        staged = self.staging / checkpoint.name
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(checkpoint, staged, copy_function=os.link)
        return staged

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            logger.error("what was trained cannot be stored: %s", error)
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _send_lines(self) -> None:
        logged = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._in_a_hurry or self._all_said(), timeout=FLUSH_S)
                lines, self._lines, self._in_a_hurry = self._lines, [], False
                last = self._all_said()
            if lines:
                content = "".join(lines).encode()
                self._send(lambda content=content: self.journal.write(content))
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
                (staged, line, told), self._next, self._sending = self._next, None, True
                self._changed.wait_for(lambda told=told: self._stored >= told or self._error)
                if self._error:
                    return
            self.store.upload_folder(staged, f"{self.prefix}/checkpoints/{staged.name}", self._send)
            with self._changed:
                self._tell(line, hurry=True)
                self._sending = False
                self._changed.notify_all()
            self._send(lambda newest=staged.name: self._remove_old(newest))
            shutil.rmtree(staged, ignore_errors=True)

    def _remove_old(self, newest: str) -> None:
        """Of what is stored, keeps what is on this machine, and the newest two up to this one at any rate."""
        stored = stored_checkpoints(self.store, self.prefix)
        kept = {path.name for path in (self.folder / "checkpoints").glob("step-*")}
        kept |= set([name for name in stored if name <= newest][-LEAST_STORED:])
        for name in stored:
            if name not in kept:
                self.store.remove_folder(f"{self.prefix}/checkpoints/{name}")

    def _send(self, call: Callable[[], T]) -> T:
        """Makes a call to the store, as the holder of the lease, for as long as there is time."""

        def held() -> T:
            self.lease.check()
            return call()

        def give_up(waited: float) -> bool:
            return self._ended_at is not None and time.monotonic() - self._ended_at > RETRY_LIMIT_S

        return retry(held, give_up)

    def _send_log(self) -> None:
        try:
            self.store.upload(self.folder / "log.txt", f"{self.prefix}/log.txt")
        except Exception as error:  # it is sent again, and nothing depends on it
            logger.debug("the log was not sent: %s", error)

    def _all_said(self) -> bool:
        """Whether nothing can be added any more: checkpoints add their lines late."""
        return self._closed and not self._threads[1].is_alive()


def stored_checkpoints(store: ObjectStore, prefix: str) -> list[str]:
    """The names of a trial's checkpoints in a store, whole or not, oldest first."""
    folder = f"{prefix}/checkpoints/"
    return sorted({name.removeprefix(folder).partition("/")[0] for name in store.names(folder.rstrip("/"))})
