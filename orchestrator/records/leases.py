"""A trial is trained by one process at a time: the one that holds its lease.

A lease is a sequence of objects, ``00000001.json``, ``00000002.json``, ..., each created only if absent: the process
that creates the next one holds the lease, so only one of several takes it over. The newest object names its owner and
counts the owner's heartbeats. Clocks of two machines are never compared: a waiter checks that the counter advances.

    held by a process of this machine that has ended     taken over at once
    held by an earlier start of the same attempt         taken over at once: Ray Train has ended it
    its heartbeat has not changed for 30 s               taken over
    otherwise                                            waited for

An owner that finds an object newer than its own has lost the lease, and must stop writing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.records.object_store import LocalStore, ObjectStore, retry

logger = logging.getLogger(__name__)

# A holder without a heartbeat for this long counts as dead; it sends six in that time.
LIMIT_S = 30.0
POLL_S = 1.0


class LeaseLost(RuntimeError):
    """Another process has taken the lease over."""


def owner(attempt: str, sweep: str) -> dict[str, Any]:
    """This process, as a lease names it. ``attempt`` is the same for restarts of the same work."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "process_start": process_start(pid),
        "attempt": attempt,
        "sweep": sweep,
    }


class Lease:
    """The lease with its objects in ``store`` under ``folder``. A context: acquired on entry, released on exit."""

    def __init__(
        self,
        store: ObjectStore | LocalStore,
        folder: str,
        owner: dict[str, Any],
        limit_s: float = LIMIT_S,
        poll_s: float = POLL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.folder, self.owner, self.limit_s, self.poll_s = store, folder, owner, limit_s, poll_s
        self.clock = clock
        self.generation = 0
        self.lost: LeaseLost | None = None
        self._beat_at = 0.0
        self._beats = 0
        self._beating = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def acquire(self) -> None:
        """Waits until the lease is free or its owner is dead, and takes it.

        Raises:
            StoreUnavailable: the store has not answered for minutes.
        """
        seen: bytes | None = None
        since = looked = self.clock()
        while True:
            newest = retry(self._newest)
            content = retry(partial(self.store.read, self._name(newest))) if newest else None
            now = self.clock()
            # While the store was unreachable, its holder's heartbeats could not reach it either.
            if content != seen or now - looked > self.limit_s / 2:
                seen, since = content, now
            looked = now
            if newest == 0 or self._is_free(content) or now - since > self.limit_s:
                if self._create(newest + 1):
                    break
                continue
            time.sleep(self.poll_s)
        logger.info("holds lease %s, generation %d", self.folder, self.generation)
        self._thread.start()

    def check(self) -> None:
        """Call this before writing anything that only the holder may write.

        A process that was suspended, and may have lost the lease meanwhile, asks the store.

        Raises:
            LeaseLost: another process holds the lease now.
        """
        if self.lost:
            raise self.lost
        if self.clock() - self._beat_at > self.limit_s / 2:
            self._beat()

    def release(self) -> None:
        """Frees the lease, unless it was lost."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self.lost:
            try:
                self._beat(released=True)
            except LeaseLost:
                pass
            except Exception:  # it expires
                logger.warning("lease %s could not be released", self.folder, exc_info=True)

    def _is_free(self, content: bytes | None) -> bool:
        try:
            held = json.loads(content or b"")
            return held["released"] or held["owner"]["attempt"] == self.owner["attempt"] or is_dead(held["owner"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False  # being written; if that is never completed, it expires

    def _create(self, generation: int) -> bool:
        self._nonce = uuid.uuid4().hex
        content, began = self._content(released=False), self.clock()
        name = self._name(generation)
        # If the answer to a creation is lost, the next try finds our own content.
        if not retry(lambda: self.store.create(name, content) or self.store.read(name) == content):
            return False
        self.generation, self._beat_at = generation, began
        # The newest stays, so that numbers never restart; the one before too, in case it is being read.
        older = [self._name(number) for number in retry(self._generations) if number < generation - 1]
        retry(partial(self.store.remove, older))
        return True

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.limit_s / 6):
            try:
                self._beat()
            except LeaseLost as error:
                logger.error("%s", error)
                return
            except Exception as error:  # `check` asks again before anything is written
                logger.warning("lease %s could not be renewed: %s", self.folder, error)

    def _beat(self, released: bool = False) -> None:
        with self._beating:
            if self.lost:
                raise self.lost
            began = self.clock()
            if self._newest() != self.generation:
                self.lost = LeaseLost(
                    f"lease {self.folder} was taken over by another process, which did not see this one (pid "
                    f"{os.getpid()} on {socket.gethostname()}) for {self.limit_s:.0f} s; this one writes nothing more"
                )
                raise self.lost
            self._beats += 1
            self.store.write(self._name(self.generation), self._content(released))
            self._beat_at = began

    def _content(self, released: bool) -> bytes:
        return json.dumps(
            {"owner": self.owner, "nonce": self._nonce, "beat": self._beats, "released": released}
        ).encode()

    def _newest(self) -> int:
        return max(self._generations(), default=0)

    def _generations(self) -> list[int]:
        stems = [Path(name).stem for name in self.store.names(self.folder)]
        return [int(stem) for stem in stems if stem.isdigit()]

    def _name(self, generation: int) -> str:
        return f"{self.folder}/{generation:08d}.json"


def is_dead(owner: dict[str, Any]) -> bool:
    """Whether an owner is known to be dead: a process of this machine and container that has ended.

    Nothing is known of a process elsewhere.
    """
    return is_here(owner) and process_start(owner["pid"]) != owner.get("process_start")


def is_here(owner: dict[str, Any]) -> bool:
    """Whether it is, or was, a process of this machine and container."""
    return owner.get("machine") is not None and owner["machine"] == _machine()


def holder(store: ObjectStore | LocalStore, folder: str) -> dict[str, Any] | None:
    """The owner named by a lease's newest object, or None if it was released or the owner is known to be dead.

    One read does not tell whether an owner elsewhere has died.
    """
    newest = max((name for name in store.names(folder) if Path(name).stem.isdigit()), default=None)
    try:
        content: dict[str, Any] = json.loads(store.read(newest) or b"") if newest else {"released": True}
        return None if content["released"] or is_dead(content["owner"]) else content["owner"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # being written, or damaged


def _machine() -> str | None:
    """This machine since its boot, and the container: the scope of a process id. None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """When a process began, in clock ticks since boot, which tells it from a later one with the same id.

    None if there is no such process, or only a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start
